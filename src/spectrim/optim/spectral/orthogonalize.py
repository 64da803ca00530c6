"""The polar factor of Muon: every singular value set to one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor
from typing_extensions import override

from spectrim.operators import orthogonalize
from spectrim.operators.clip import Precision
from spectrim.operators.half import half_polar
from spectrim.optim.spectral.base import Part, SpectralOperator, StepContext, in_place, runs_in_half, workspace_of

__all__ = ["Orthogonalize"]


@dataclass(frozen=True)
class Orthogonalize(SpectralOperator):
    """σ → 1, accurately or, with ``steps``, as approximately as that many steps of Muon's iteration."""

    steps: int | None = None
    precision: Precision = "auto"

    label: ClassVar[str] = "orthogonalize"

    @classmethod
    @override
    def of(cls, options: Mapping[str, Any]) -> Self:
        return cls(options.get("orthogonalize_steps"), options["precision"])

    @override
    def whole(self, parts: Sequence[Part], context: StepContext) -> None:
        def polar(stacks: list[Tensor]) -> Sequence[Tensor]:
            if runs_in_half(self.precision, stacks[0].device):
                return half_polar(stacks, steps=self.steps, overwrite=True)
            return [orthogonalize(stack, steps=self.steps, precision="exact", overwrite=True) for stack in stacks]

        in_place(parts, polar, workspace_of(self.precision, parts[0].matrices.device))
