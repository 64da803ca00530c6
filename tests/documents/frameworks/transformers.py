"""A tiny model, data for it, and arguments that train for four steps on a CPU."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

torch.manual_seed(0)
shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape))
data = [{"input_ids": tokens, "labels": tokens} for tokens in torch.randint(32, (32, 8))]
steps = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4}
arguments = TrainingArguments("out", use_cpu=True, disable_tqdm=True, report_to="none", **steps)
