"""Fine-tune a causal language model by LoRA, with a spectral recipe and a monitor, through the Trainer of transformers.

python examples/finetune_trainer.py                          # offline: a tiny model on the sources of Python's library
python examples/finetune_trainer.py --model Qwen/Qwen3-0.6B --text my_corpus --steps 1000 --report-to wandb
"""

import argparse
import json
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import spectrim
from spectrim.integrations.transformers import LearningRates, OptimizerFactory, SpectralMonitor

LENGTH = 128


def model_and_tokens(name: str | None, text: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """A model of the hub or of a folder with the text in its tokens; or a tiny new one, whose tokens are bytes."""
    if name is not None:
        tokens = AutoTokenizer.from_pretrained(name)(text, return_tensors="pt", verbose=False).input_ids[0]
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16), tokens
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape)), torch.tensor(list(text.encode()))


def read(folder: Path, limit: int) -> str:
    """The text of a folder's files, up to a number of characters."""
    text = ""
    for path in sorted(folder.glob("*.*")):
        if path.suffix in (".py", ".txt", ".md") and len(text) < limit:
            text += path.read_text(encoding="utf-8", errors="ignore")
    return text[:limit]


def main() -> None:
    """Read the options; checkpoints go to a temporary folder unless there is another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name on the hub or folder; a tiny new model unless given")
    parser.add_argument(
        "--text", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="folder of .py, .txt, .md"
    )
    parser.add_argument("--out", type=Path, help="folder of checkpoints; a temporary one unless given")
    parser.add_argument("--recipe", default="adamw+clip", help=f"one of {', '.join(spectrim.recipes())}")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--report-to", default="none", help="tensorboard, wandb and so on")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        train(options, options.out or Path(temporary))


def train(options: argparse.Namespace, out: Path) -> None:
    """Train, and print the loss, what the optimizer did to parameters of each role, and which matrix moved fastest."""
    model, tokens = model_and_tokens(options.model, read(options.text, 2_000_000))
    blocks = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    rows = [{"input_ids": block, "labels": block} for block in blocks[torch.randperm(len(blocks))]]
    # Adapters in every linear layer; of a new model embedding and head are trained in full as well.
    whole = ["embed_tokens", "lm_head"] if options.model is None else None
    adapters = LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", modules_to_save=whole
    )
    arguments = TrainingArguments(
        str(out), max_steps=options.steps, per_device_train_batch_size=8, lr_scheduler_type="cosine", warmup_steps=0.1,
        logging_steps=10, save_steps=options.steps, report_to=options.report_to, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        get_peft_model(model, adapters),
        arguments,
        train_dataset=rows[64:],
        eval_dataset=rows[:64],
        optimizer_cls_and_kwargs=(OptimizerFactory, {"name": options.recipe, "lr": options.lr, "weight_decay": 0.1}),
    )
    LearningRates(trainer)
    SpectralMonitor(trainer, every=20, out=out / "monitor.jsonl")

    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"\nevaluation loss {before:.3f} -> {trainer.evaluate()['eval_loss']:.3f}")
    rules = Counter((row.role, row.rule) for row in spectrim.describe(trainer.optimizer.optimizer).rows)
    for (role, rule), count in rules.items():
        print(f"{count} x {role}: {rule}")
    records = map(json.loads, (out / "monitor.jsonl").read_text().splitlines())
    record = next(record for record in records if record["parameters"])
    moved = {name: entry["update_to_weight"] or 0.0 for name, entry in record["parameters"].items()}
    name = max(moved, key=lambda name: moved[name])
    print(f"fastest: {name} moved by {moved[name]:.2%} of its norm in step {record['step']}")


if __name__ == "__main__":
    main()
