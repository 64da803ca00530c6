"""Computes the cost of a recipe's step on many ranks from shapes: operations, bytes and state.

Nothing is measured and nothing allocated: :func:`read_work` takes shapes and rules from an optimizer on the meta
device, :func:`cost` applies the formulas of the sharded optimizer, and :func:`project` compares them with a step of
training. ``docs/scaling.md`` has the derivation and its limits. Relied on by ``spectrim plan``.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from spectrim.lab.planning.settings import Cluster, Hardware

if TYPE_CHECKING:
    from torch import nn

    from spectrim.optim.optimizer import SpectralOptimizer

__all__ = [
    "Projection",
    "StepCost",
    "Work",
    "active_parameters",
    "cost",
    "gathering",
    "project",
    "read_work",
]

FLOAT = 4
"""Bytes of an entry that is sent or stored: float32."""

STEP_FLOPS = 5
"""Further operations per entry: two to screen its gradient, one for its decay, two to subtract the update."""

SHRINK_FLOPS = 11
"""Operations on an entry whose gradient is shrunk: three for the scale, eight for y / (1 + (y/τ)²)."""

NUMBER = 8
"""Bytes of a number that is summed over ranks: float64."""

SCREENING_NUMBERS = 3
"""Numbers per parameter that ranks sum before a step: the gradient's largest magnitude, and flags for its presence."""

STEP_NUMBERS = 1
"""Numbers that ranks sum once per step: a flag for other values that are not finite."""

ORTHONORMAL_GRAMS = 2
"""Gram matrices of k x k that make sharded columns orthonormal."""

SPIKE_NORMS = 2
"""Norms that are summed to shape a spike: the matrix's and its tail's."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of a recipe on one parameter in one step, after the first step.

    Attributes:
        shape: as stored, (1,) for a number; its first dimension is the one that is cut.
        stack: how many experts lie along the first dimension; 0 for a parameter that is no stack.
        matrices: (m, n) of the logical matrices, of one expert for a stack; none for a vector.
        visits: how many operators need a whole matrix: one for a clip or the polar factor, one for a pre-clip.
        whole_flops: operations of those visits, for each of the matrices.
        ranks: k of the followed spike for each matrix, or nothing.
        in_place_flops: operations of an operator that works on shards, for each of the matrices, or nothing.
        transposed: inputs lie along the dimension that is cut, not outputs.
        entry_flops: operations on every entry.
        numbers: the count of numbers that ranks sum: screening, scales of shrinkage, norms.
        state_bytes: of the tensors of the parameter's shape; not of step counts. basis_bytes: of the spike's basis.
    """

    shape: tuple[int, ...]
    stack: int
    matrices: tuple[tuple[int, int], ...]
    visits: int
    whole_flops: tuple[float, ...]
    ranks: tuple[int, ...]
    in_place_flops: tuple[float, ...]
    transposed: bool
    entry_flops: int
    numbers: int
    state_bytes: int
    basis_bytes: int

    @property
    def entries(self) -> int:
        """Number of scalars in the parameter."""
        return math.prod(self.shape)

    @property
    def copies(self) -> int:
        """The number of experts; one if the parameter is no stack."""
        return max(1, self.stack)

    @property
    def spike_flops(self) -> float:
        """Operations to track and shape the spikes, for one expert of a stack."""
        return sum(self.in_place_flops)


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """The cost of one step of an optimizer on a rank: the mean over ranks, and the largest.

    Attributes:
        flops, bytes_sent, state_bytes: means over ranks.
        busiest_flops, busiest_bytes_sent: of the rank that owns most. largest_state_bytes: of the first rank, which
            holds the larger piece wherever a parameter cannot be cut evenly.
    """

    flops: float
    busiest_flops: float
    bytes_sent: float
    busiest_bytes_sent: float
    state_bytes: float
    largest_state_bytes: float

    def seconds(self, hardware: Hardware) -> float:
        """Time of the busiest rank, without overlap of operations and communication."""
        return self.busiest_flops / hardware.flops + self.busiest_bytes_sent / hardware.bandwidth


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A recipe's cost, its cost with whole matrices on every rank, and their shares of a step; computed, not
    measured."""

    recipe: str
    cost: StepCost
    share: float
    gathered: StepCost
    gathered_share: float


# -- From an optimizer to its work -------------------------------------------------------------------------------------


def read_work(optimizer: SpectralOptimizer) -> list[Work]:
    """The work of an optimizer on each of its parameters, which may be on the meta device."""
    return [_work(optimizer, group, parameter) for group in optimizer.param_groups for parameter in group["params"]]


def _work(optimizer: SpectralOptimizer, group: Mapping[str, Any], parameter: Any) -> Work:

    from spectrim.optim.grouping.layout import matrix_shapes
    from spectrim.optim.spectral.spike import ShapeSpike, spike_rank
    from spectrim.optim.stepping.entries import role_and_layout

    _, layout = role_and_layout(group, parameter)
    rule = optimizer.rule_of(group, parameter)
    shapes = [] if rule.vector else matrix_shapes(parameter.shape, layout, group["split"])
    stack = parameter.shape[0] if layout in ("stack", "transposed_stack") else 0
    matrices = [(shape[-2], shape[-1]) for shape in shapes]
    operator = rule.operator
    pre_clipper = None if rule.pre_clip is None else rule.pre_clipper
    gathering = [each for each in (operator, rule.clip) if each is not None and each.gathers]
    dense = [*gathering, *([pre_clipper] if pre_clipper is not None else [])]
    state = optimizer.state_of(parameter, group, "")
    basis = sum(state[key].nbytes for key in operator.keys) if operator is not None else 0
    in_place = operator if operator is not None and not operator.gathers else None
    ranks = [spike_rank(shape, operator.rank_ratio) for shape in shapes] if isinstance(operator, ShapeSpike) else []
    return Work(
        shape=tuple(parameter.shape) or (1,),
        stack=stack,
        matrices=tuple(matrices),
        visits=0 if rule.vector else int(bool(gathering)) + int(pre_clipper is not None),
        whole_flops=tuple(sum(each.flops(*shape) for each in dense) for shape in matrices),
        ranks=tuple(ranks),
        in_place_flops=() if in_place is None else tuple(in_place.flops(*shape) for shape in matrices),
        transposed=layout == "transposed",
        entry_flops=rule.direction.flops + STEP_FLOPS + SHRINK_FLOPS * (rule.shrink is not None),
        # Experts lie whole on one rank, so their scales need no sum.
        numbers=SCREENING_NUMBERS
        + (rule.shrink is not None and not stack) * max(1, len(matrices))
        # Norms of corrected gradients are summed for every expert.
        + bool(rule.direction.corrects) * len(matrices) * max(1, stack)
        + int(rule.vector and rule.clip is not None),
        state_bytes=sum(value.nbytes for value in state.values() if value.ndim) - basis,
        basis_bytes=basis,
    )


# -- From work to cost -------------------------------------------------------------------------------------------------


def cost(work: Sequence[Work], cluster: Cluster) -> StepCost:
    """The cost of a step as the sharded optimizer does it.

    Entry-wise work and Spectra's products are done where the entries lie. Every other matrix has an owner rank, which
    receives its pieces and returns them. Experts that lie whole on a single rank stay there. With "ddp" every rank does
    everything, and nothing is sent.
    """
    loads = [_in_place(item, cluster) for item in work]
    owned: list[tuple[float, float]] = []
    there = 0.0
    for item in work:
        if cluster.parallel == "ddp":
            flops = sum(item.whole_flops) * item.copies
            loads.append(_Load(flops, flops, 0.0))
        elif item.stack and cluster.replicas == 1:
            each = sum(item.whole_flops)
            most = math.ceil(item.stack / cluster.shards)
            loads.append(_Load(each * item.stack / cluster.world, each * most, 0.0))
        elif item.visits:
            size = sum(FLOAT * item.visits * m * n for m, n in item.matrices)
            # The pieces of one replica travel to the owner, the result to every holder of a piece but the owner. An
            # expert is one piece, which the owner holds as likely as any rank of its replica.
            there += size * (1 - 1 / cluster.shards) * item.copies
            back = size * (cluster.replicas - 1 / cluster.shards)
            owned += [(sum(item.whole_flops), back)] * item.copies
    owned_flops, owned_bytes = map(sum, zip(*owned, strict=True)) if owned else (0.0, 0.0)
    busiest_flops, busiest_bytes = _busiest_owner(owned, cluster.world)
    sent = sum(load.sent for load in loads) + there / cluster.world + _summed(STEP_NUMBERS, cluster)
    return StepCost(
        flops=sum(load.mean for load in loads) + owned_flops / cluster.world,
        busiest_flops=sum(load.most for load in loads) + busiest_flops,
        bytes_sent=sent + owned_bytes / cluster.world,
        busiest_bytes_sent=sent + busiest_bytes,
        **_state(work, cluster.shards),
    )


def gathering(work: Sequence[Work], cluster: Cluster) -> StepCost:
    """The cost if every rank with a piece of a matrix gathered all of it and did the same work.

    A matrix that one step needs whole twice is gathered twice. Experts that lie whole on a rank are worked on there.
    """
    cut = cluster.shards
    loads = []
    for item in work:
        flops = item.entries * item.entry_flops
        whole = sum(item.whole_flops) + item.spike_flops
        loads.append(_Load(flops / cut, flops * _first_piece(item.shape[0], cut), _summed(item.numbers, cluster)))
        if item.stack:
            loads.append(_Load(whole * item.stack / cut, whole * math.ceil(item.stack / cut), 0.0))
        else:
            gathers = max(item.visits, 1 if item.ranks else 0)
            size = sum(FLOAT * gathers * m * n for m, n in item.matrices)
            loads.append(_Load(whole, whole, size * (cut - 1) / cut))
    sent = sum(load.sent for load in loads) + _summed(STEP_NUMBERS, cluster)
    return StepCost(
        flops=sum(load.mean for load in loads),
        busiest_flops=sum(load.most for load in loads),
        bytes_sent=sent,
        busiest_bytes_sent=sent,
        **_state(work, cut),
    )


def project(recipe: str, work: Sequence[Work], cluster: Cluster, hardware: Hardware, *, active: float) -> Projection:
    """Compare a recipe's cost with 6 operations a token for each of the ``active`` parameters."""
    training = 6 * active * hardware.tokens / hardware.flops

    def share(of: StepCost) -> float:
        seconds = of.seconds(hardware)
        return seconds / (training + seconds)

    own, gathered = cost(work, cluster), gathering(work, cluster)
    return Projection(recipe=recipe, cost=own, share=share(own), gathered=gathered, gathered_share=share(gathered))


def active_parameters(model: nn.Module, work: Iterable[Work]) -> float:
    """Parameters active for a token: all except the experts that it does not use."""
    config = getattr(model, "config", None)
    taken = getattr(config.get_text_config(), "num_experts_per_tok", None) if config is not None else None
    return sum(item.entries * (min(1.0, taken / item.stack) if taken and item.stack else 1.0) for item in work)


class _Load(NamedTuple):
    """Operations, as mean over ranks and on the busiest rank, and bytes that every rank sends."""

    mean: float
    most: float
    sent: float


def _in_place(item: Work, cluster: Cluster) -> _Load:
    """Work done on every rank's own entries: entry-wise recipes, and Spectra's products with few columns."""
    cut = cluster.shards
    flops = item.entries * item.entry_flops + item.spike_flops * item.copies
    sent = _summed(item.numbers, cluster)
    if not item.stack:
        for (m, n), k in zip(item.matrices, item.ranks, strict=False):
            # V is gathered, MᵀU summed and gathered, over the ranks that hold other outputs; where they hold other
            # inputs, M V is summed and orthonormal columns gathered.
            rows = 2 * m if item.transposed else 3 * n
            sent += FLOAT * k * rows * (cut - 1) / cut
            sent += _summed(ORTHONORMAL_GRAMS * k * k + k + SPIKE_NORMS, cluster)
    return _Load(flops / cut, flops * _first_piece(item.shape[0], cut), sent)


def _busiest_owner(owned: Sequence[tuple[float, float]], ranks: int) -> tuple[float, float]:
    """The operations and the bytes of the busiest rank, if the next largest matrix goes to the rank with the least
    work."""
    loads = [(0.0, 0.0)] * max(1, min(ranks, len(owned)))
    for flops, size in sorted(owned, reverse=True):
        least = loads[0]
        heapq.heapreplace(loads, (least[0] + flops, least[1] + size))
    return max(flops for flops, _ in loads), max(size for _, size in loads)


def _summed(numbers: int, cluster: Cluster) -> float:
    """Bytes that a rank sends to sum this many numbers: each is sent twice, except for the rank's own share."""
    return 0.0 if cluster.parallel == "ddp" else 2 * NUMBER * numbers * (cluster.world - 1) / cluster.world


def _first_piece(rows: int, cut: int) -> float:
    """The first rank's share of a dimension under FSDP2's split."""
    return math.ceil(rows / cut) / rows if rows else 0.0


def _state(work: Sequence[Work], cut: int) -> dict[str, float]:
    """Bytes of state: the mean over ranks, and the first rank's. A basis is cut along its inputs, or by expert."""
    largest = 0.0
    for item in work:
        first = _first_piece(item.shape[0], cut)
        inputs = first if item.stack or not item.basis_bytes else _first_piece(item.matrices[0][1], cut)
        largest += item.state_bytes * first + item.basis_bytes * inputs
    return {
        "state_bytes": sum(item.state_bytes + item.basis_bytes for item in work) / cut,
        "largest_state_bytes": largest,
    }
