"""Chooses matrices of a model by name, and reads them from its parameters.

By default those of the first, a middle and the last layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import Tensor, nn

from spectrim.lab.errors import LabError
from spectrim.lab.logging.monitor_log import layer_of
from spectrim.optim.grouping.groups import param_groups
from spectrim.optim.grouping.layout import Layout, matrices

__all__ = ["ChosenMatrix", "choose"]


@dataclass(frozen=True, kw_only=True)
class ChosenMatrix:
    """A logical matrix of a parameter."""

    name: str
    """The parameter's name, with [i] for one of several projections and .expert-j for one of several experts."""
    parameter: str
    role: str
    layer: int | None
    kind: str
    """Its name within the layer, the same in every layer."""
    layout: Layout
    split: tuple[int, ...] | None
    part: int
    expert: int | None

    def read(self, tensor: Tensor, *, leading: int = 0) -> Tensor:
        """The matrix (m, n) in a tensor of the parameter's shape, or (..., m, n) in a stack of such."""
        view = matrices(tensor, self.layout, self.split, leading=leading)[self.part]
        return view if self.expert is None else view.select(leading, self.expert)


def choose(
    model: nn.Module, *, layers: Sequence[int] | None = None, patterns: Sequence[str] | None = None
) -> list[ChosenMatrix]:
    """Choose matrices, in the model's order.

    Args:
        model: any causal language model.
        layers: their numbers, from 0; their hidden matrices are taken.
        patterns: globs over parameters' names; every matrix that one of them matches, embeddings and heads too.

    Raises:
        LabError: a number or a pattern matches nothing, or the model has no matrices.

    Without either: the hidden matrices of the first, a middle and the last layer. Of a stack of experts, the first, a
    middle and the last one are taken.
    """
    known = list(read(model))
    if patterns:
        for pattern in patterns:
            if not any(fnmatchcase(each.parameter, pattern) for each in known):
                example = next((each.parameter for each in known if each.role == "matrix"), "nothing")
                raise LabError(
                    f"--parameters {pattern!r} matches no matrix of the model; its names are like {example!r}, and "
                    f"'*' stands for any characters"
                )
        found = [each for each in known if any(fnmatchcase(each.parameter, pattern) for pattern in patterns)]
    else:
        hidden = [each for each in known if each.role == "matrix"]
        known_layers = sorted({each.layer for each in hidden if each.layer is not None})
        for layer in layers or ():
            if layer not in known_layers:
                have = f"{known_layers[0]} to {known_layers[-1]}" if known_layers else "not numbered"
                raise LabError(f"--layers {layer}: the model's layers are {have}")
        wanted = set(layers) if layers else set(spread(known_layers))
        found = [each for each in hidden if each.layer in wanted] if known_layers else hidden
    if not found:
        raise LabError("the model has no hidden matrices to look at; choose others by --parameters")
    return with_kinds(found)


def spread(numbers: Sequence[int]) -> list[int]:
    """The first, a middle and the last value, without repetition."""
    places = dict.fromkeys((0, len(numbers) // 2, len(numbers) - 1))
    return [numbers[place] for place in places] if numbers else []


def read(model: nn.Module) -> Iterator[ChosenMatrix]:
    """Every matrix of the model."""
    order = {name: index for index, (name, _) in enumerate(model.named_parameters())}
    groups = [(group, name, parameter) for group in param_groups(model) for name, parameter in group["params"]]
    for group, name, parameter in sorted(groups, key=lambda item: order[item[1]]):
        views = matrices(parameter, group["layout"], group["split"])
        for part, view in enumerate(views):
            whole = f"{name}[{part}]" if len(views) > 1 else name
            layer, short = layer_of(whole)
            experts = spread(range(len(view))) if view.ndim == 3 else [None]
            for expert in experts:
                which = "" if expert is None else f".expert-{expert}"
                yield ChosenMatrix(
                    name=whole + which,
                    parameter=name,
                    role=group["role"],
                    layer=layer,
                    kind=short + which,
                    layout=group["layout"],
                    split=None if group["split"] is None else tuple(group["split"]),
                    part=part,
                    expert=expert,
                )


def with_kinds(found: Sequence[ChosenMatrix]) -> list[ChosenMatrix]:
    """The matrices with distinct kinds within a layer; equal kinds of two towers of a model become full names."""
    keys = [(each.layer, each.kind) for each in found]
    return [
        each if keys.count(key) == 1 else replace(each, kind=each.name) for each, key in zip(found, keys, strict=True)
    ]
