"""A small model, three batches and a loss."""

import torch
from torch import nn

model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16))
batches = [torch.randint(16, (4,)) for _ in range(3)]


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch), batch)
