"""SFTTrainer of TRL with a recipe's optimizer: adapters, rates by role, the monitor, and a run that resumes."""

from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import spectrim
import trainer_cases as cases
from spectrim.integrations.transformers import LearningRates, OptimizerFactory, SpectralMonitor


def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each digit."""
    plain = Tokenizer(
        models.WordLevel({"[UNK]": 0, "[PAD]": 1, **{str(i): i + 2 for i in range(10)}}, unk_token="[UNK]")
    )
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", pad_token="[PAD]", eos_token="[UNK]")


def trainer(folder: Path) -> SFTTrainer:
    steps = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2, "max_length": 12}
    made = SFTTrainer(
        cases.model(),
        SFTConfig(str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, **steps),
        train_dataset=Dataset.from_dict({"text": [f"{i} {i + 1} {i + 2} {i + 3}" for i in range(7)]}),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["wpe"]),
        optimizer_cls_and_kwargs=(OptimizerFactory, {"name": "muon", "lr": 1e-2, "embedding_lr": 0.1}),
    )
    LearningRates(made)
    SpectralMonitor(made, every=2)
    return made


def test_adapters_are_tuned_with_their_roles_logged_and_resumed_to_the_bit(tmp_path):
    run = trainer(tmp_path)
    run.train()
    roles = {row.name: row.role for row in spectrim.describe(run.optimizer.optimizer).rows}
    assert {role for name, role in roles.items() if "lora_" in name} == {"matrix"}
    assert {role for name, role in roles.items() if "lora_" not in name} == {"embedding"}
    logged = [line for line in run.state.log_history if "loss" in line]
    assert [line["step"] for line in logged if "spectral/update_norm" in line] == [2, 4]
    assert all(abs(line["learning_rate/embedding"] - 0.1 * line["learning_rate/matrix"]) < 1e-12 for line in logged)
    assert all("entropy" in line for line in logged), "what TRL logs is there as well"

    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = cases.weights(run.model)
    for name, weight in cases.weights(resumed.model).items():
        assert torch.equal(weight, expected[name]), name
