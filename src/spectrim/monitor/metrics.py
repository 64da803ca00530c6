"""Measures matrices as rows of numbers on their device, and computes metrics from the rows on the host.

A :class:`MatrixRequest` defines the numbers and their order, so that the rows of many matrices form one tensor.
Singular values are estimated from sketches (:mod:`sketch`), or exact on request.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from spectrim.monitor.sketch import (
    LANCZOS_STEPS,
    PROBES,
    TAIL_SAMPLE,
    WIDTH,
    entry_statistics,
    gram_of_singular_values,
    krylov_columns,
    krylov_grams,
    lanczos_coefficients,
    wide,
)
from spectrim.operators._stack import as_matrices, energy

__all__ = [
    "KINDS",
    "Kind",
    "MatrixRequest",
    "Reading",
    "measure",
    "rank_of_spike",
    "read",
    "singular_values",
]

#: The share of singular values that form the spike (arXiv 2602.11185).
RANK_RATIO = 0.015

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
            return {"gram": (small, small)} if small <= WIDTH else {"lanczos": (PROBES, 2, LANCZOS_STEPS)}
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
    fields = request.fields
    found: dict[str, Tensor] = {}
    if "energy" in fields:
        found["energy"] = torch.cat([energy(Y) for Y in wides])
    if "largest" in fields:
        each = [entry_statistics(Y, None if request.exact else TAIL_SAMPLE) for Y in wides]
        found["largest"], found["tail_index"] = map(torch.cat, zip(*each, strict=True))
    if "singular_values" in fields:
        found["singular_values"] = torch.cat([singular_values(Y) for Y in wides])
    elif "krylov" in fields:
        found["krylov"] = krylov_grams(wides, request.rank, found["energy"])
    elif "gram" in fields:
        found["gram"] = torch.cat([gram_of_singular_values(Y) for Y in wides])
    else:
        found["lanczos"] = lanczos_coefficients(wides)
    return torch.cat([found[name].reshape(sum(map(len, wides)), -1) for name in fields], dim=-1)


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
            return {"above": _share_above(found["lanczos"], bound)}
        every = _singular_values_of(found["gram"]) if values is None else values
        return {"above": torch.where(every.isnan(), math.nan, (every > bound[:, None]).double()).mean(-1)}
    leading = _singular_values_of(found.pop("krylov")) if values is None else values
    return {**found, "norm": leading[:, 0], "spike": leading[:, : request.rank].square().sum(-1)}


def rank_of_spike(shape: tuple[int, ...] | torch.Size, rank_ratio: float = RANK_RATIO) -> int:
    """The number of singular values in the spike of an m x n matrix."""
    return max(1, round(rank_ratio * min(shape[-2:])))


def singular_values(X: Tensor) -> Tensor:
    """All singular values of every matrix, (..., min(m, n)), descending, in float64.

    They come from the float64 Gram matrix of the smaller side, exact to 1e-8 of the largest, as float32 data allow.
    """
    return _singular_values_of(gram_of_singular_values(wide(as_matrices(X))))


def _singular_values_of(gram: Tensor) -> Tensor:
    """Singular values, descending, from a Gram matrix (..., s, s); NaN if it is not finite."""
    finite = gram.isfinite().all(-1).all(-1)[..., None, None]
    squares = torch.linalg.eigvalsh(torch.where(finite, gram, 0.0)).flip(-1)
    return torch.where(finite[..., 0], squares.clamp_min(0).sqrt(), math.nan)


def _share_above(coefficients: Tensor, threshold: Tensor) -> Tensor:
    """The share of singular values above a threshold (...), from :func:`~spectrim.monitor.sketch.lanczos_coefficients`.

    Each start gives the nodes and weights of a Gauss quadrature. Between nodes, the distribution is interpolated
    linearly in the logarithm of the singular value, with half of a node's weight on either side.
    """
    diagonal, off = coefficients.unbind(-2)
    finite = coefficients.isfinite().all(-1).all(-1).all(-1)
    safe = torch.where(finite[..., None, None], diagonal, 0.0)
    beside = torch.where(finite[..., None, None], off, 0.0)[..., :-1]
    tridiagonal = torch.diag_embed(safe) + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    weights = vectors[..., 0, :].square()
    tiny = nodes.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny) * 1e-16
    places = torch.maximum(nodes, tiny).log()
    middles = weights.cumsum(-1) - weights / 2
    at = 2 * threshold.double().clamp_min(torch.finfo(torch.float64).tiny).log()
    below = _interpolated(at[..., None].expand(places.shape[:-1]), places, middles)
    return torch.where(finite, 1 - below.mean(-1), math.nan)


def _interpolated(at: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """A piecewise linear distribution function with K nodes (..., K), at one point (...)."""
    index = torch.searchsorted(places.contiguous(), at[..., None].contiguous())
    right = index.clamp(1, places.shape[-1] - 1)
    left = right - 1
    x0, x1 = places.gather(-1, left), places.gather(-1, right)
    y0, y1 = values.gather(-1, left), values.gather(-1, right)
    share = ((at[..., None] - x0) / (x1 - x0).clamp_min(1e-300)).clamp(0, 1)
    found = (y0 + share * (y1 - y0))[..., 0]
    found = torch.where(index[..., 0] == 0, 0.0, found)
    return torch.where(index[..., 0] == places.shape[-1], 1.0, found)
