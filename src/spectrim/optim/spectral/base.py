"""The base class of spectral operators, and the stacks of matrices that they work on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from spectrim.kernels.lists import grouped
from spectrim.operators.clip import Precision
from spectrim.operators.half import half_workspace
from spectrim.optim.memory import packed, workspace_bytes

if TYPE_CHECKING:
    from spectrim.distributed.collectives import Team
    from spectrim.distributed.grid import Grid
    from spectrim.optim.stepping.entries import Entry

__all__ = ["ADAMW_RMS", "LEAST_NORM", "Part", "SpectralOperator", "StepContext", "in_place", "runs_in_half"]

Shape = Sequence[int]

#: The root mean square of a typical AdamW update, to which "rms" and "match_rms_adamw" scale (arXiv 2602.11185 and
#: torch.optim.Muon).
ADAMW_RMS = 0.2

#: Norms up to here count as zero, since float32 has few digits for smaller numbers.
LEAST_NORM = 1e-30

#: Devices whose float16 products are several times faster than float32; "meta" stands for one of them.
HALF_DEVICES = ("cuda", "meta")


@dataclass(kw_only=True, eq=False)
class Part:
    """One logical matrix of every parameter of a stack: the same rows of each.

    Attributes:
        matrices: (E, m, n), in float32 or wider; the operator writes its result here.
        state: the operator's state, stacked likewise. The operator replaces tensors instead of writing to them.
        norm: (E,), the Frobenius norm of the result, if the operator computes it.
    """

    matrices: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)
    norm: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """Properties of the step that operators use.

    Attributes:
        first: the group has taken no step yet.
        threshold: the clip threshold: a number, or a scalar tensor on the device.
    """

    first: bool = False
    threshold: float | Tensor | None = None


@dataclass(frozen=True)
class SpectralOperator(ABC):
    """An operation on the singular values of matrices. Its dataclass fields are its options; operators with equal
    options are equal.

    Attributes:
        label: its name for ``describe``.
        keys: names of its state tensors.
        gathers: True if owners gather sharded matrices and apply :meth:`whole`; otherwise :meth:`sharded` works on the
            shards.
    """

    label: ClassVar[str]
    keys: ClassVar[tuple[str, ...]] = ()
    gathers: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """The operator with the options of a param group."""

    @abstractmethod
    def whole(self, parts: Sequence[Part], context: StepContext) -> None:
        """Work on stacks of whole matrices, in place, without reading a device."""

    def step_by_kernels(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """Take the whole step of the entries that the operator's kernels support; returns the other entries.

        All entries have one rule structure, skip flag, device and dtypes."""
        return entries

    def flops(self, m: int, n: int) -> float:
        """Operations of the matrix products for one m x n matrix on an accelerator; ``spectrim plan`` counts them."""
        return _counted_flops(self, m, n)

    def vector_factors(self, norms: Tensor, context: StepContext) -> Tensor | None:
        """Factors (E,) on vectors with these norms (E,), in float64; None if vectors stay as they are."""
        return None

    def start(self, shapes: Sequence[Shape], *, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """New state for a parameter whose logical matrices have these shapes (..., m, n)."""
        return {}

    def state_of_parts(self, state: Mapping[str, Tensor], shapes: Sequence[Shape]) -> list[dict[str, Tensor]]:
        """Views of a parameter's state, one dictionary for each logical matrix."""
        return [{} for _ in shapes]

    def sharded(
        self,
        team: Team,
        grids: Sequence[Grid],
        blocks: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        context: StepContext,
    ) -> list[tuple[Tensor, Tensor]]:
        """Work on this rank's blocks of sharded matrices, if ``gathers`` is False.

        Args:
            team: the ranks, all of which call this with their blocks of the same matrices.
            grids: the division of each matrix over the ranks.
            blocks: (..., rows, columns), this rank's block of each matrix; not written to.
            states: the local part of the operator's state. The operator replaces tensors instead of writing to them.

        Returns:
            For every block the result, and the Frobenius norm of the whole result.
        """
        raise TypeError(f"{type(self).__name__} works on whole matrices only")


@cache
def _counted_flops(operator: SpectralOperator, m: int, n: int) -> float:
    """The operations that an operator takes, counted on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton if that is installed

    device = torch.device("meta")
    state = operator.state_of_parts(operator.start([(m, n)], device=device, dtype=torch.float32), [(m, n)])[0]
    stacked = {key: value.unsqueeze(0) for key, value in state.items()}
    part = Part(matrices=torch.empty(1, m, n, device=device), state=stacked)
    with FlopCounterMode(display=False) as counter:
        operator.whole([part], StepContext(threshold=1.0))
    return float(counter.get_total_flops())


def runs_in_half(precision: Precision, device: torch.device) -> bool:
    """True if operators compute in float16 with float32 accumulation on this device."""
    return precision == "half" or (precision == "auto" and device.type in HALF_DEVICES)


def workspace_of(precision: Precision, device: torch.device) -> Callable[[Tensor], int] | None:
    """Bytes of workspace for one matrix of a stack; None on the host, where buckets are small."""
    if runs_in_half(precision, device):
        return lambda stack: half_workspace(*stack.shape[-2:])
    # In float64: the matrix, the result, and four matrices of the smaller side.
    double = torch.float64.itemsize
    return None if device.type == "cpu" else lambda X: double * (2 * X[0].numel() + 4 * min(X.shape[-2:]) ** 2)


def in_place(
    parts: Sequence[Part],
    function: Callable[[list[Tensor]], Sequence[Tensor]],
    workspace: Callable[[Tensor], int] | None = None,
) -> None:
    """Replace matrices by a function's results, in calls with stacks of one smaller side.

    Args:
        workspace: see :func:`workspace_of`. A call takes as many matrices as fit in
            :func:`~spectrim.optim.memory.workspace_bytes`, at least one.
    """
    families = grouped([part.matrices for part in parts], lambda stack: min(stack.shape[-2:]))
    for family in families.values():
        for stacks in [family] if workspace is None else packed(family, workspace, workspace_bytes()):
            for stack, result in zip(stacks, function(stacks), strict=True):
                # A compiler cannot trace the comparison of memory.
                if torch.compiler.is_compiling() or not torch._C._is_alias_of(result, stack):  # type: ignore[attr-defined]
                    stack.copy_(result)
