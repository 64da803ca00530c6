"""Weights of every kind that the page speaks of."""

import torch
from torch import nn

import spectrim  # noqa: F401  what every page takes for imported

model = nn.ModuleDict(
    {
        "attention": nn.ModuleDict(
            {
                "norm": nn.LayerNorm(16),
                "qkv": nn.Linear(16, 768 + 2 * 256, bias=False),
                "wqkv": nn.Linear(16, 2 * (256 + 2 * 64), bias=False),
            }
        ),
        "mlp": nn.ModuleDict({"gate_up": nn.Linear(16, 64, bias=False)}),
        "lm_head": nn.Linear(16, 64, bias=False),
    }
)
hidden = matrices = [nn.Parameter(torch.zeros(8, 8))]
vectors = [nn.Parameter(torch.zeros(8))]
tables = [nn.Parameter(torch.zeros(64, 8))]
