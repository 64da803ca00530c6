"""What is measured of one matrix, as a row of numbers: worked out on its device, read on the host.

A :class:`MatrixRequest` says which numbers are wanted and in which order, so that the rows of many matrices are sent
and read as one tensor.
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
    """Which numbers to measure of a matrix.

    Attributes:
        kind: what it is. Of a gradient the entries are looked at too; of a direction, the update before its clip's
            threshold, nothing but how its singular values are spread.
        shape: (m, n).
        rank: of the spike.
        exact: all singular values and entries, instead of estimates.
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
            # Of a small matrix the host can as well find all singular values.
            return {"gram": (small, small)} if small <= WIDTH else {"lanczos": _lanczos_field(small)}
        return found | {"krylov": (krylov_columns(small, self.rank),) * 2}

    @cached_property
    def length(self) -> int:
        """How many numbers there are."""
        return sum(map(math.prod, self.fields.values()))


def _lanczos_field(small: int) -> tuple[int, ...]:
    probes, steps = lanczos_shape(small)
    return (probes, 2, steps)


def measure(request: MatrixRequest, *stacks: Tensor) -> Tensor:
    """The requested numbers of stacks of matrices (Eᵢ, m, n): (ΣEᵢ, request.length), in float64.

    Waits for the device only if the request is exact.

    Args:
        request: for the first stack, and for others of the same smaller side, which ask for as many numbers.
        stacks: of one dtype; what is alike of them is worked out in one batch.
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


#: What the numbers of a stack of E matrices say, on the host: tensors of shape (E), by name. "energy" is ‖X‖_F², "norm"
#: σ₁, "spike" the energy in the leading directions; "largest" and "tail_index" are of the entries; "singular_values",
#: (E, ...) and descending, are there where exact; "above" is the share of them above a threshold.
Reading = dict[str, Tensor]


def read(request: MatrixRequest, numbers: Tensor, *, limit: float | Tensor = math.nan) -> Reading:
    """Metrics from rows of numbers (E, request.length).

    Args:
        request: by which they were measured.
        numbers: on the host.
        limit: the threshold that a direction's singular values are held against; one for all, or (E).
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
