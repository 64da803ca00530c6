"""Measures a matrix as a row of numbers on its device, and reads metrics from the row on the host.

A :class:`MatrixRequest` defines the numbers and their order, so that the rows of many matrices form one tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from spectrim.monitor.metrics import share_of, singular_values, singular_values_of
from spectrim.monitor.sketch import (
    WIDTH,
    Entries,
    entry_statistics,
    gram_of_singular_values,
    krylov_columns,
    krylov_grams,
    lanczos_coefficients,
    lanczos_shape,
    wide,
)
from spectrim.operators._stack import as_matrices, energy

__all__ = ["KINDS", "Kind", "MatrixRequest", "Reading", "measure", "read"]

Kind = Literal["gradient", "momentum", "update", "direction", "weight"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class MatrixRequest:
    """The numbers to measure for a matrix.

    Attributes:
        kind: the kind of matrix. For a gradient, statistics of entries are measured too; for a direction, the update as
            the clip left it, only the distribution of singular values.
        shape: (m, n).
        rank: number of singular values in the spike.
        exact: measure all singular values and entries instead of estimates.
    """

    kind: Kind
    shape: tuple[int, int]
    rank: int
    exact: bool

    @cached_property
    def fields(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of the numbers, in order."""
        small = min(self.shape)
        found: dict[str, tuple[int, ...]] = {}
        if self.kind != "direction":
            found["energy"] = ()
        if self.kind == "gradient":
            found |= {"largest": (), "tail_index": ()}
        if self.exact:
            return found | {"singular_values": (small,)}
        if self.kind == "direction":
            # For small matrices the host computes all singular values.
            probes, steps = lanczos_shape(small)
            return {"gram": (small, small)} if small <= WIDTH else {"lanczos": (probes, 2, steps)}
        return found | {"krylov": (krylov_columns(small, self.rank),) * 2}

    @cached_property
    def length(self) -> int:
        """The number of numbers."""
        return sum(map(math.prod, self.fields.values()))


def measure(request: MatrixRequest, *stacks: Tensor) -> Tensor:
    """The requested numbers (ΣEᵢ, request.length), in float64, for stacks of matrices (Eᵢ, m, n).

    Waits for the device only if the request is exact.

    Args:
        request: for the first stack; the other stacks have the same smaller side, and thus as many numbers.
        stacks: of one dtype. Their common work is done in one batch.
    """
    wides = [wide(as_matrices(X)) for X in stacks]
    found: dict[str, Tensor] = {}
    if request.kind == "gradient":
        each = [entry_statistics(Y, sample=None) if request.exact else entry_statistics(Y) for Y in wides]
        found = {name: torch.cat(parts) for name, parts in zip(Entries._fields, zip(*each, strict=True), strict=True)}
    elif request.kind != "direction":
        found["energy"] = torch.cat([energy(Y) for Y in wides])
    if request.exact:
        found["singular_values"] = torch.cat([singular_values(Y) for Y in wides])
    elif request.kind != "direction":
        found["krylov"] = krylov_grams(wides, request.rank, found["energy"])
    elif "gram" in request.fields:
        found["gram"] = torch.cat([gram_of_singular_values(Y) for Y in wides])
    else:
        found["lanczos"] = lanczos_coefficients(*wides)
    return torch.cat([found[name].reshape(sum(map(len, wides)), -1) for name in request.fields], dim=-1)


#: Metrics of a stack of E matrices on the host: name -> tensor (E). "energy" is ‖X‖_F², "norm" σ₁, "spike" the energy
#: of the spike; "largest" and "tail_index" describe entries; "above" is the share of singular values above a threshold;
#: "singular_values", (E, ...) and descending, exist for exact requests.
Reading = dict[str, Tensor]


def read(request: MatrixRequest, numbers: Tensor, *, limit: float | Tensor = math.nan) -> Reading:
    """Metrics from rows of numbers (E, request.length).

    Args:
        request: the request of :func:`measure`.
        numbers: the numbers on the host.
        limit: the threshold for a direction's "above"; one number, or (E).
    """
    parts = torch.split(numbers, [math.prod(shape) for shape in request.fields.values()], dim=-1)
    found = {name: part.view(-1, *shape) for (name, shape), part in zip(request.fields.items(), parts, strict=True)}
    values = found.get("singular_values")
    if request.kind == "direction":
        bound = torch.as_tensor(limit, dtype=torch.float64).expand(len(numbers))
        if "lanczos" in found:
            return {"above": share_of(found["lanczos"], bound)}
        every = singular_values_of(found["gram"]) if values is None else values
        return {"above": torch.where(every.isnan(), math.nan, (every > bound[:, None]).double()).mean(-1)}
    leading = singular_values_of(found.pop("krylov")) if values is None else values
    return {**found, "norm": leading[:, 0], "spike": leading[:, : request.rank].square().sum(-1)}
