"""What happens to stacks of matrices between products: sums with a coefficient for each matrix, and Frobenius norms.

All stacks of a list in one launch and one pass over memory, where torch takes one for each stack and operation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .choice import switched_on
from .lists import is_dense

__all__ = ["combine", "frobenius_norms"]

Stacks = Sequence[Tensor]

#: Dtypes that the kernels take.
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


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
