"""A new operator is one class in one file: its numbers, its state, what it does, and what it costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import nn

import spectrim
from spectrim.optim import Recipe, SpectralOptimizer
from spectrim.optim.directions import Average
from spectrim.optim.spectral.base import Part, SpectralOperator, StepContext


@dataclass(frozen=True)
class Flatten(SpectralOperator):
    """σ → σ^power, and the largest σ of every matrix is remembered."""

    power: float

    label: ClassVar[str] = "flatten"
    keys: ClassVar[tuple[str, ...]] = ("largest",)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        return cls(options["power"])

    def whole(self, parts: Sequence[Part], context: StepContext) -> None:
        for part in parts:
            U, S, Vh = torch.linalg.svd(part.matrices, full_matrices=False)
            part.state["largest"] = torch.maximum(part.state["largest"], S[:, 0])
            part.matrices.copy_(U @ (S[..., None] ** self.power * Vh))

    def start(self, shapes, *, device, dtype):
        return {"largest": torch.zeros((*shapes[0][:-2], len(shapes)), device=device, dtype=dtype)}

    def state_of_parts(self, state, shapes):
        return [{"largest": state["largest"][..., part]} for part in range(len(shapes))]


class Flattened(SpectralOptimizer):
    """Averaged momentum, its singular values raised to a power."""

    recipe = Recipe(direction=Average, operator=Flatten)

    def __init__(self, params, lr=1e-2, power=0.5, **options):
        own = {"lr": lr, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0, "power": power}
        super().__init__(params, own, options)


def test_an_operator_of_ones_own_works_on_every_layout_and_keeps_its_state():
    torch.manual_seed(0)
    model = nn.ModuleDict({"square": nn.Linear(6, 6, bias=False), "fused": nn.Linear(6, 12, bias=False)})
    experts = nn.Parameter(torch.randn(3, 5, 4))
    groups = spectrim.param_groups(model, split={"fused.weight": (4, 8)})
    groups.append({"params": [("experts", experts)], "role": "matrix", "layout": "stack"})
    optimizer = Flattened(groups)
    before = {name: p.detach().clone() for name, p in model.named_parameters()} | {"experts": experts.detach().clone()}
    found = {**dict(model.named_parameters()), "experts": experts}
    for parameter in found.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()

    def flattened(G):
        U, S, Vh = torch.linalg.svd(0.1 * G, full_matrices=False)
        return U @ (S[..., None] ** 0.5 * Vh), S[..., 0]

    for name, parameter in found.items():
        pieces = parameter.grad.split((4, 8)) if name == "fused.weight" else [parameter.grad]
        moved = torch.cat([flattened(piece)[0] for piece in pieces], dim=-2)
        torch.testing.assert_close(parameter.detach(), before[name] - 1e-2 * moved)
        largest = torch.stack([flattened(piece)[1] for piece in pieces], dim=-1)
        torch.testing.assert_close(optimizer.state[parameter]["largest"], largest)
    rules = {row.name: row.rule for row in spectrim.describe(optimizer).rows}
    assert rules["square.weight"] == "average → flatten"
    again = Flattened(groups)
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state[experts]["largest"], optimizer.state[experts]["largest"])
