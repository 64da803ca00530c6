"""A small model and a step of training, for the pages on recipes and operators of one's own."""

import torch
from torch import nn


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False)])


def train_a_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    after = [parameter.detach().clone() for parameter in model.parameters()]
    assert not any(map(torch.equal, before, after))
    for parameter in model.parameters():
        parameter.grad.fill_(torch.nan)
    optimizer.step()
    assert all(map(torch.equal, after, model.parameters()))
    assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())
