"""Linear combinations and Frobenius norms of stacks of matrices, with a coefficient for each matrix.

The Triton forms take one launch and one pass over memory for all stacks of a list.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .choice import FLOATS, switched_on
from .lists import is_dense

__all__ = ["clip_scales", "combine", "frobenius_norms", "program_numbers"]

Stacks = Sequence[Tensor]

#: Lower bound on norms that are divided by. The square roots of it and of its reciprocal are float32 numbers.
SMALLEST = 1e-60
#: Upper bound on thresholds.
LARGEST = 3e38


def combine(out: Stacks, x: Stacks, a: Tensor, y: Stacks | None = None, b: Tensor | None = None) -> None:
    """out ← a x + b y, with numbers a and b for every matrix; computed in the precision of a, then rounded.

    Args:
        out: stacks (E, m, n) of any floating-point dtypes; may be x itself.
        x, y: stacks of the same shapes and memory layouts.
        a, b: (ΣE,), of one dtype, float32 or float64. Without b, the factor of y is one.

    Raises:
        ValueError: a vector does not have one number for each matrix.
    """
    count = sum(len(stack) for stack in out)
    for name, vector in (("a", a), ("b", b)):
        if vector is not None and (vector.shape != (count,) or vector.dtype != a.dtype):
            raise ValueError(
                f"{name} is {vector.dtype} of shape {tuple(vector.shape)}: expected {a.dtype} of ({count},)"
            )
    if _kernel_takes("combine", out, x, *(() if y is None else (y,))):
        from .device import stacks as device

        device.combine(list(out), list(x), a.contiguous(), list(y or ()), b)
        return
    counts = [len(stack) for stack in out]
    lefts = torch.split(a.view(-1, 1, 1), counts)
    rights = None if b is None else torch.split(b.view(-1, 1, 1), counts)
    for index, target in enumerate(out):
        if y is not None and rights is None:
            torch.addcmul(y[index], x[index], lefts[index], out=target)
            continue
        torch.mul(x[index], lefts[index], out=target)
        if y is not None and rights is not None:
            target.addcmul_(y[index], rights[index])


def frobenius_norms(stacks: Stacks) -> Tensor:
    """The Frobenius norms of all matrices of stacks (E, m, n), as one float64 vector (ΣE,)."""
    if _kernel_takes("frobenius_norms", stacks):
        from .device import stacks as device

        return device.square_sums(list(stacks)).sqrt_()  # type: ignore[no-any-return]
    norms = [torch.linalg.vector_norm(stack, dim=(-2, -1), dtype=torch.float64) for stack in stacks]
    return norms[0] if len(norms) == 1 else torch.cat(norms)


def clip_scales(
    stacks: Stacks, threshold: float | Tensor, *, size: float, most: float, least: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Scales for clipping every matrix X at c: unit = size/√(‖X‖_F² + c²), low = c · unit, and c.

    Args:
        stacks: (E, m, n), float32.
        threshold: c > 0: a number or scalar tensor for all matrices, or a vector (ΣE,).
        size: the Frobenius norm of the scaled [X; cI].
        most: upper bound on c, as a multiple of ‖X‖_F.
        least: lower bound on low, as a share of size.

    Returns:
        (ΣE,) each: unit in float64, low and c in float32.
    """
    if _kernel_takes("clip_scales", stacks):
        from .device import stacks as device

        tensor, number = (threshold.contiguous(), 1.0) if isinstance(threshold, Tensor) else (None, float(threshold))
        found: tuple[Tensor, Tensor, Tensor] = device.clip_scales(
            list(stacks), tensor, number, size, most, least, SMALLEST
        )
        return found
    norm = frobenius_norms(stacks).clamp_min(SMALLEST)
    bound = (most * norm).clamp_max(LARGEST)
    c = torch.minimum(bound, threshold) if isinstance(threshold, Tensor) else bound.clamp_max(threshold)
    unit = size / torch.hypot(norm, c)
    return unit, (c * unit).clamp_min(size * least).float(), c.float()


def program_numbers(
    stack: Tensor, low: Tensor | None, table: Tensor, powers: Tensor, ends: Tensor | None, *, smallest: float
) -> Tensor:
    """Numbers for every matrix X of a stack: the table's row for its interval, times powers of ‖X‖_F.

    Args:
        stack: (E, m, n).
        low: (E,), or None if the table has one row. Row i is for ‖X‖_F/low⁴ up to ends[i], the last row for all above.
        table: (numbers, rows), float32.
        powers: (numbers, 1), exponents of max(‖X‖_F, smallest), by which each number is multiplied.
        ends: (rows - 1,), ascending.

    Returns:
        (numbers, E), float32, contiguous.
    """
    if _kernel_takes("program_numbers", [stack]):
        from .device import stacks as device

        return device.program_numbers(stack, low, table, powers, ends, smallest)  # type: ignore[no-any-return]
    norm: Tensor = torch.linalg.vector_norm(stack, dim=(-2, -1), dtype=torch.float32).clamp_min(smallest)
    if low is not None and ends is not None:
        table = table.index_select(1, torch.bucketize(norm / low**4, ends))
    result: Tensor = norm**powers * table
    return result


def _kernel_takes(kernel: str, *lists: Stacks) -> bool:
    """True if a kernel runs: for dense matrices with equal strides in all lists."""
    if torch.compiler.is_compiling() or not switched_on(kernel, lists[0][0].device):
        return False
    for alike in zip(*lists, strict=True):
        strides = alike[0].stride()[1:]
        if not (alike[0].is_contiguous() or (len(alike[0]) and is_dense(alike[0][0]))):
            return False
        if any(stack.dtype not in FLOATS or stack.stride()[1:] != strides for stack in alike):
            return False
    return True
