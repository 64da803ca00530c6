"""Spectra's operator: the spike, the few largest singular values, is shrunk to the tail's scale (arXiv 2602.11185)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor
from typing_extensions import override

from spectrim.kernels.choice import switched_on
from spectrim.kernels.spike import MOST_DIRECTIONS, SpikeMatrix, spike_step
from spectrim.operators.spike import follow_and_shape_stacks, start_basis
from spectrim.optim.directions import Momentum
from spectrim.optim.grouping.layout import Layout, sizes_of
from spectrim.optim.spectral.base import ADAMW_RMS, LEAST_NORM, Part, Shape, SpectralOperator, StepContext

if TYPE_CHECKING:
    from spectrim.distributed.collectives import Team
    from spectrim.distributed.grid import Grid
    from spectrim.optim.stepping.entries import Entry

__all__ = ["ShapeSpike", "spike_rank"]

#: The fewest power steps of the first step, which starts from a random basis.
FIRST_POWER_STEPS = 4


#: Decay of the record of a matrix's norm in one step, as a power of the momentum's decay. It is slower than momentum,
#: so that a matrix without gradients falls below its record, and fast enough to forget a single large gradient.
RECORD_POWER = 0.5

#: Lower bound on the norm by which results are scaled, as a share of the record.
LEAST_SHARE = 0.25


@dataclass(frozen=True)
class ShapeSpike(SpectralOperator):
    """Track the spike by power steps from its stored basis, and shrink it; the tail stays as it is.

    The result is later divided by its norm. The norm is bounded below by a share of its recent maximum, so that a
    matrix without gradients, such as an expert without tokens, stops moving as its momentum decays.
    """

    rank_ratio: float
    momentum: float
    power_steps: int

    label: ClassVar[str] = "shape spike"
    keys: ClassVar[tuple[str, ...]] = ("spike_basis", "norm_record")
    gathers: ClassVar[bool] = False

    @classmethod
    @override
    def of(cls, options: Mapping[str, Any]) -> Self:
        return cls(options["rank_ratio"], options["momentum"], options["power_steps"])

    def _steps(self, first: bool) -> int:
        """The number of power steps in a step of the optimizer."""
        return max(FIRST_POWER_STEPS, self.power_steps) if first else self.power_steps

    @override
    def whole(self, parts: Sequence[Part], context: StepContext) -> None:
        bases = [part.state["spike_basis"] for part in parts]
        results = follow_and_shape_stacks([part.matrices for part in parts], bases, steps=self._steps(context.first))
        counts = [len(part.matrices) for part in parts]
        norms = self._recorded([part.state for part in parts], [correction.norm for correction, _ in results], counts)
        for part, (correction, basis), norm in zip(parts, results, norms, strict=True):
            part.matrices.baddbmm_(correction.U, correction.right.mT)
            part.state["spike_basis"] = basis
            part.norm = norm

    def _recorded(
        self, states: Sequence[dict[str, Tensor]], norms: Sequence[Tensor], counts: Sequence[int]
    ) -> Sequence[Tensor]:
        """Update the records of all stacks; returns the norms by which results are scaled."""
        norm = torch.cat([each.reshape(-1) for each in norms])
        record = torch.cat([state["norm_record"].reshape(-1) for state in states])
        record = torch.maximum(norm, record * self.momentum**RECORD_POWER)
        for state, new in zip(states, torch.split(record, list(counts)), strict=True):
            state["norm_record"] = new.view(state["norm_record"].shape)
        scaled: Sequence[Tensor] = torch.split(torch.maximum(norm, LEAST_SHARE * record), list(counts))
        return scaled

    @override
    def step_by_kernels(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        rule, found = entries[0].rule, entries[0].found
        direction = rule.direction
        plain = rule.scale == "rms" and rule.clip is None and rule.pre_clip is None and rule.shrink is None
        if not plain or rule.maximize or rule.narrow_state or rule.still:
            return entries
        if not switched_on("spike_step", entries[0].parameter.device) or not isinstance(direction, Momentum):
            return entries
        if direction.nesterov or direction.sign:
            return entries
        taken: list[Entry] = []
        rest: list[Entry] = []
        matrices: list[SpikeMatrix] = []
        # torch.compile ignores lru_cache and warns about it.
        matrices_of = _matrices if torch.compiler.is_compiling() else _kept_matrices
        for entry in entries:
            sizes, interleaved = (None, False) if entry.split is None else sizes_of(entry.split)
            # Interleaved matrices are not contiguous in memory.
            shape = tuple(entry.parameter.shape)
            own = None if interleaved else matrices_of(shape, entry.layout, sizes, self.rank_ratio)
            if own is None:
                rest.append(entry)
            else:
                matrices += [SpikeMatrix(len(taken), *numbers) for numbers in own]
                taken.append(entry)
        buffers, bases, records = ([entry.state[key] for entry in taken] for key in (*direction.keys, *self.keys))
        if taken and spike_step(
            [entry.parameter for entry in taken],
            [entry.grad for entry in taken],
            buffers,
            bases,
            records,
            matrices,
            lr=[entry.rule.lr for entry in taken],
            weight_decay=[entry.rule.weight_decay for entry in taken],
            decay=direction.decay,
            average=direction.average,
            steps=self._steps(rule.first),
            rms=ADAMW_RMS,
            keep=self.momentum**RECORD_POWER,
            share=LEAST_SHARE,
            floor=LEAST_NORM,
            found=found,
        ):
            return rest
        return entries

    @override
    def start(self, shapes: Sequence[Shape], *, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The first basis (..., n, k), with the columns of all parts side by side; and the records (..., parts) of
        norms."""
        bases, stack = [], []
        for *stack, m, n in shapes:
            rank = spike_rank((m, n), self.rank_ratio)
            bases.append(start_basis(n, rank, device=device, dtype=dtype).expand(*stack, n, rank))
        record = torch.zeros((*stack, len(shapes)), device=device, dtype=dtype)
        return {"spike_basis": torch.cat(bases, dim=-1), "norm_record": record}

    @override
    def state_of_parts(self, state: Mapping[str, Tensor], shapes: Sequence[Shape]) -> list[dict[str, Tensor]]:
        ends = list(itertools.accumulate(spike_rank(shape, self.rank_ratio) for shape in shapes))
        columns = zip([0, *ends], ends, strict=False)
        return [
            {"spike_basis": state["spike_basis"][..., a:b], "norm_record": state["norm_record"][..., part]}
            for part, (a, b) in enumerate(columns)
        ]

    @override
    def sharded(
        self,
        team: Team,
        grids: Sequence[Grid],
        blocks: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        context: StepContext,
    ) -> list[tuple[Tensor, Tensor]]:
        from spectrim.distributed.spike import Block, shape_spikes

        pieces = [
            Block(grid=grid, M=M, V=state["spike_basis"]) for grid, M, state in zip(grids, blocks, states, strict=True)
        ]
        corrections = shape_spikes(team, pieces, steps=self._steps(context.first))
        for state, piece in zip(states, pieces, strict=True):
            state["spike_basis"] = piece.V
        norms = [norm for _, _, norm in corrections]
        scaled = self._recorded(states, norms, [norm.numel() for norm in norms])
        found = zip(blocks, corrections, scaled, strict=True)
        return [(M + left @ right.mT, norm.view(own.shape)) for M, (left, right, own), norm in found]


def _matrices(
    shape: tuple[int, ...], layout: Layout, split: tuple[int, ...] | None, rank_ratio: float
) -> list[tuple[int, ...]] | None:
    """The fields of :class:`~spectrim.kernels.spike.SpikeMatrix` after its first, for every logical matrix.

    None if the matrices are not contiguous, or a spike has too many directions for kernels."""
    if layout not in ("matrix", "stack", "flatten"):
        return None
    experts, rows = shape[:2] if layout == "stack" else (1, shape[0])
    columns = math.prod(shape) // (experts * rows)
    sizes = (rows,) if split is None else split
    ranks = [spike_rank((size, columns), rank_ratio) for size in sizes]
    if max(ranks) > MOST_DIRECTIONS:
        return None
    stride = sum(ranks)
    found: list[tuple[int, ...]] = []
    for expert in range(experts):
        row = expert * rows
        for number, (size, rank) in enumerate(zip(sizes, ranks, strict=True)):
            basis = expert * columns * stride + sum(ranks[:number])
            found.append((row * columns, size, columns, rank, basis, stride, expert * len(sizes) + number))
            row += size
    return found


_kept_matrices = lru_cache(4096)(_matrices)


def spike_rank(shape: Shape, rank_ratio: float) -> int:
    """The number of singular values in the spike of an m x n matrix: max(1, round(r · min(m, n)))."""
    return max(1, round(rank_ratio * min(shape[-2:])))
