"""A model to optimize."""

from torch import nn

model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16))
