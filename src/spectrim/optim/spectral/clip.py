"""Spectral clipping of matrices, and of vectors by their norm (arXiv 2603.14315)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from typing_extensions import override

from spectrim.operators import hard_clip, soft_clip
from spectrim.operators.clip import Precision
from spectrim.operators.half import half_clip
from spectrim.optim.spectral.base import Part, SpectralOperator, StepContext, in_place, runs_in_half, workspace_of

__all__ = ["CLIPS", "HardClip", "SoftClip"]


@dataclass(frozen=True)
class SoftClip(SpectralOperator):
    """σ → σ/√(1 + σ²/c²), for the threshold c of the step."""

    precision: Precision = "auto"

    label: ClassVar[str] = "clip"

    @classmethod
    @override
    def of(cls, options: Mapping[str, Any]) -> Self:
        return cls(options["precision"])

    @override
    def whole(self, parts: Sequence[Part], context: StepContext) -> None:
        threshold = context.threshold
        assert threshold is not None

        def clipped(stacks: list[Tensor]) -> Sequence[Tensor]:
            if runs_in_half(self.precision, stacks[0].device):
                return half_clip(stacks, [threshold] * len(stacks), overwrite=True)
            return [soft_clip(stack, threshold, precision="exact", overwrite=True) for stack in stacks]

        in_place(parts, clipped, workspace_of(self.precision, parts[0].matrices.device))

    @override
    def vector_factors(self, norms: Tensor, context: StepContext) -> Tensor:
        assert context.threshold is not None
        return 1 / torch.hypot(torch.ones_like(norms), norms / context.threshold)


@dataclass(frozen=True)
class HardClip(SpectralOperator):
    """σ → min(σ, c), by an eigendecomposition in float64 on every device."""

    label: ClassVar[str] = "clip"

    @classmethod
    @override
    def of(cls, options: Mapping[str, Any]) -> Self:
        return cls()

    @override
    def whole(self, parts: Sequence[Part], context: StepContext) -> None:
        threshold = context.threshold
        assert threshold is not None
        in_place(parts, lambda stacks: [hard_clip(stack, threshold) for stack in stacks])

    @override
    def vector_factors(self, norms: Tensor, context: StepContext) -> Tensor:
        assert context.threshold is not None
        return 1 / (norms / context.threshold).clamp_min(1)

    @override
    def flops(self, m: int, n: int) -> float:
        small, large = sorted((m, n))
        return 4.0 * small * small * large + 9.0 * small**3


CLIPS: Mapping[str, type[SpectralOperator]] = {"soft": SoftClip, "hard": HardClip}
