"""What a spectral operator is, and the stacks of matrices that it works on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from spectrim.operators.clip import Precision
from spectrim.operators.half import half_workspace
from spectrim.optim.memory import workspace_bytes

if TYPE_CHECKING:
    from spectrim.distributed.collectives import Team
    from spectrim.distributed.grid import Grid
    from spectrim.optim.stepping.entries import Entry

__all__ = [
    "ADAMW_RMS",
    "LEAST_NORM",
    "Part",
    "SpectralOperator",
    "StepContext",
    "in_place",
    "runs_in_half",
]

Shape = Sequence[int]

#: The root mean square of a typical AdamW update, which matched scales aim at (arXiv 2602.11185 and torch.optim.Muon
#: alike).
ADAMW_RMS = 0.2

#: Norms up to here count as zero: below lie numbers that float32 holds with few digits.
LEAST_NORM = 1e-30

#: Devices whose float16 products are several times as fast as their float32 ones; "meta" stands for such a one.
HALF_DEVICES = ("cuda", "meta")


@dataclass(kw_only=True, eq=False)
class Part:
    """One logical matrix of every parameter of a stack: the same rows of each.

    Attributes:
        matrices: (E, m, n), a view of memory that the operator puts its result in; float32 or better.
        state: the operator's own, stacked likewise; the operator replaces what it changes.
        norm: (E,), the Frobenius norm of the result where the operator knows it.
    """

    matrices: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)
    norm: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """What an operator may want to know of the step.

    Attributes:
        first: True if the group has taken no step yet.
        threshold: of a clip: a number, or a scalar tensor on the device.
    """

    first: bool = False
    threshold: float | Tensor | None = None


@dataclass(frozen=True)
class SpectralOperator(ABC):
    """An operation on the singular values of matrices. Its dataclass fields are its numbers.

    Attributes:
        label: what ``describe`` shows.
        keys: of the state tensors that it keeps for a parameter.
        gathers: True if sharded matrices are brought to owners, where :meth:`whole` works on them; otherwise
            :meth:`sharded` works on the shards.
    """

    label: ClassVar[str]
    keys: ClassVar[tuple[str, ...]] = ()
    gathers: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """The operator with the numbers of a param group."""

    @abstractmethod
    def whole(self, parts: Sequence[Part], context: StepContext) -> None:
        """Work on stacks of whole matrices, in place. Nothing is read from a device."""

    def step_by_kernels(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """Take the whole step of entries of one structure, flag, device and dtypes, as far as kernels of the operator's
        own do; returns the rest."""
        return entries

    def flops(self, m: int, n: int) -> float:
        """Operations for one m x n matrix on an accelerator, products alone; what ``spectrim plan`` counts."""
        return _counted_flops(self, m, n)

    def vector_factors(self, norms: Tensor, context: StepContext) -> Tensor | None:
        """What parameters that are no matrices are multiplied by, for their norms (E,) in float64; None for one."""
        return None

    def start(self, shapes: Sequence[Shape], *, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The state of a parameter whose logical matrices, the parts of its split, have these shapes (..., m, n)."""
        return {}

    def state_of_parts(self, state: Mapping[str, Tensor], shapes: Sequence[Shape]) -> list[dict[str, Tensor]]:
        """Views of a parameter's state, one dictionary for each of its logical matrices."""
        return [{} for _ in shapes]

    def sharded(
        self,
        team: Team,
        grids: Sequence[Grid],
        blocks: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        context: StepContext,
    ) -> list[tuple[Tensor, Tensor]]:
        """Work on this rank's blocks of matrices that lie on many ranks, where ``gathers`` is false.

        Args:
            team: the ranks, all of which call this with their blocks of the same matrices.
            grids: how each matrix lies on them.
            blocks: (..., rows, columns), this rank's part of each; not written to.
            states: the local part of the operator's state; the operator replaces what it changes.

        Returns:
            For every block the result, and the Frobenius norm of the whole matrix's.
        """
        raise TypeError(f"{type(self).__name__} works on whole matrices only")

    @property
    def numbers(self) -> tuple[Any, ...]:
        """The label and all numbers: equal for operators that do the same."""
        return (self.label, *astuple(self))


@cache
def _counted_flops(operator: SpectralOperator, m: int, n: int) -> float:
    """Products counted while an operator works on a matrix without memory."""
    from torch.utils.flop_counter import FlopCounterMode  # which imports Triton, where that is installed

    device = torch.device("meta")
    state = operator.state_of_parts(operator.start([(m, n)], device=device, dtype=torch.float32), [(m, n)])[0]
    stacked = {key: value.unsqueeze(0) for key, value in state.items()}
    part = Part(matrices=torch.empty(1, m, n, device=device), state=stacked)
    with FlopCounterMode(display=False) as counter:
        operator.whole([part], StepContext(threshold=1.0))
    return float(counter.get_total_flops())


def runs_in_half(precision: Precision, device: torch.device) -> bool:
    """True if operators compute in float16 with float32 accumulation: asked for, or left open where that is fast."""
    return precision == "half" or (precision == "auto" and device.type in HALF_DEVICES)


def workspace_of(precision: Precision, device: torch.device) -> Callable[[int, int], int] | None:
    """What an operator of the products in half or in full precision needs for an m x n matrix besides its stack.

    None on the host, where buckets are small.
    """
    if runs_in_half(precision, device):
        return half_workspace
    # In float64: the matrix, what it becomes, and a handful of matrices of its smaller side.
    return None if device.type == "cpu" else lambda m, n: 8 * (2 * m * n + 4 * min(m, n) ** 2)


def in_place(
    parts: Sequence[Part],
    function: Callable[[list[Tensor]], Sequence[Tensor]],
    workspace: Callable[[int, int], int] | None = None,
) -> None:
    """Replace all matrices of one small side at a time by what a function of lists of stacks makes of them.

    Args:
        workspace: bytes that the function needs for one m x n matrix besides; so many matrices go to it at once as stay
            within :func:`~spectrim.optim.memory.workspace_bytes`, or one.
    """
    families: dict[int, list[Tensor]] = {}
    for part in parts:
        families.setdefault(min(part.matrices.shape[-2:]), []).append(part.matrices)
    for family in families.values():
        calls = [family] if workspace is None else _within(family, workspace)
        for stacks in calls:
            for stack, result in zip(stacks, function(stacks), strict=True):
                if torch.compiler.is_compiling() or not _share_memory(result, stack):
                    stack.copy_(result)


def _within(stacks: Sequence[Tensor], workspace: Callable[[int, int], int]) -> list[list[Tensor]]:
    """Stacks cut, and gathered again, into lists that need no more than the workspace."""
    calls: list[list[Tensor]] = [[]]
    room = workspace_bytes()
    for stack in stacks:
        each = max(1, workspace(stack.shape[-2], stack.shape[-1]))
        while len(stack):
            count = min(len(stack), room // each)
            if count < 1 and calls[-1]:
                calls.append([])
                room = workspace_bytes()
                continue
            count = max(1, count)
            calls[-1].append(stack[:count])
            stack, room = stack[count:], room - count * each
    return calls


def _share_memory(result: Tensor, matrices: Tensor) -> bool:
    alias: bool = torch._C._is_alias_of(result, matrices)  # type: ignore[attr-defined]
    return alias
