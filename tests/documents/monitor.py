"""A model with the names that the page speaks of, and a few steps of training after its first line."""

from pathlib import Path

import torch
import wandb
from torch import nn

import spectrim

Path("runs/a").mkdir(parents=True)
path = "checkpoint.pt"
run = wandb.init(mode="disabled")

layer = nn.ModuleDict({"mlp": nn.ModuleDict({"up_proj": nn.Linear(8, 16, bias=False)})})
model = nn.ModuleDict(
    {"model": nn.ModuleDict({"layers": nn.ModuleList([layer])}), "lm_head": nn.Linear(16, 32, bias=False)}
)
optimizer = spectrim.AdamW(spectrim.param_groups(model), lr=1e-3, clip="auto")


def train() -> None:
    hidden = layer["mlp"]["up_proj"](torch.randn(4, 8))
    model["lm_head"](hidden).square().mean().backward()
    optimizer.step()


REPLACED = {
    # So that the file which the next block reads holds something.
    "every=100)": "every=1)\nfor _ in range(3):\n    train()\nmonitor.close()",
    # Every monitor of the page in a file of its own: records are not overwritten.
    "exact_every": 'out="exact.jsonl", exact_every',
    "alarm=": 'out="alarm.jsonl", alarm=',
}
