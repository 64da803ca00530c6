"""A model to optimize."""

from torch import nn

import spectrim  # noqa: F401

model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16))
