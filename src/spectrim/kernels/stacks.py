"""What happens to stacks of matrices between products: sums with a coefficient for each matrix, and Frobenius norms.

All stacks of a list in one launch and one pass over memory, where torch takes one for each stack and operation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .choice import FLOATS, switched_on
from .lists import is_dense

__all__ = ["clip_scales", "combine", "frobenius_norms", "program_numbers"]

Stacks = Sequence[Tensor]

#: A norm below counts as this one, so that a matrix of zeros divides by something; its square root and that of its
#: reciprocal are float32 numbers.
SMALLEST = 1e-60
#: And a threshold above as this one.
LARGEST = 3e38


def combine(out: Stacks, x: Stacks, a: Tensor, y: Stacks | None = None, b: Tensor | None = None) -> None:
    """out ← a x + b y for every matrix, with numbers a and b of its own; computed in the precision of a, then rounded.

    Args:
        out: stacks (E, m, n) of any floating-point dtypes; x may be written to in place.
        x, y: stacks of the same shapes and memory layouts.
        a, b: (all E together,), of one dtype, float32 or float64. Without b, y has the factor one.

    Raises:
        ValueError: a vector that does not have one number for each matrix.
    """
    count = sum(len(stack) for stack in out)
    for name, vector in (("a", a), ("b", b)):
        if vector is not None and (vector.shape != (count,) or vector.dtype != a.dtype):
            raise ValueError(
                f"{name} is {vector.dtype} of shape {tuple(vector.shape)}: expected {a.dtype} of ({count},)"
            )
    if _kernel_takes("combine", out, x, *(() if y is None else (y,))):
        from .device import stacks as device

        device.combine(list(out), list(x), a.contiguous(), None if y is None else list(y), b)
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
    """The Frobenius norm of every matrix of some stacks (E, m, n), in one float64 vector."""
    if _kernel_takes("frobenius_norms", stacks):
        from .device import stacks as device

        return device.square_sums(list(stacks)).sqrt_()  # type: ignore[no-any-return]
    norms = [torch.linalg.vector_norm(stack, dim=(-2, -1), dtype=torch.float64) for stack in stacks]
    return norms[0] if len(norms) == 1 else torch.cat(norms)


def clip_scales(
    stacks: Stacks, threshold: float | Tensor, *, size: float, most: float, least: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What a clip at c needs of every matrix X: unit = size/√(‖X‖_F² + c²), low = c · unit, and c.

    Args:
        stacks: (E, m, n), float32.
        threshold: c > 0 for all matrices, a number or a scalar tensor; or a vector, (all E together,).
        size: the Frobenius norm of [X; cI] in units.
        most: c counts as no more than so many times ‖X‖_F.
        least: low is at least so much of the size.

    Returns:
        unit in float64, low and c in float32, (all E together,).
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
    """Numbers for every matrix X of a stack, from a table: those of the row that serves its interval, scaled by ‖X‖_F.

    Args:
        stack: (E, m, n).
        low: (E,), or None where the table has one row. Row i serves ‖X‖_F/low⁴ up to ends[i], the last one all above.
        table: (numbers, rows), float32.
        powers: (numbers, 1): of max(‖X‖_F, smallest), by which each number is multiplied.
        ends: (rows - 1,), rising.

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
    """True if a kernel is to run: on matrices without gaps, which lie alike in all lists."""
    if torch.compiler.is_compiling() or not switched_on(kernel, lists[0][0].device):
        return False
    for alike in zip(*lists, strict=True):
        strides = alike[0].stride()[1:]
        if not (alike[0].is_contiguous() or (len(alike[0]) and is_dense(alike[0][0]))):
            return False
        if any(stack.dtype not in FLOATS or stack.stride()[1:] != strides for stack in alike):
            return False
    return True
