"""A model with a matrix that is wider than tall."""

from torch import nn

import spectrim  # noqa: F401

model = nn.ModuleDict(
    {
        "embed": nn.Embedding(16, 8),
        "layers": nn.ModuleList([nn.Linear(8, 24), nn.Linear(24, 8)]),
        "lm_head": nn.Linear(8, 16, bias=False),
    }
)
