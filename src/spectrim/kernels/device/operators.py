"""How a kernel becomes an operator of torch, how it is launched, and what all kernels over lists are given."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..costs import COSTS, Cost
from ..shrinking import FORMS
from ..table import BLOCK

__all__ = ["addresses", "entrywise", "form_number", "launch", "operator", "types"]

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def operator(
    schema: str, *, mutates: tuple[str, ...] = (), cost: Callable[..., Cost], fake: Callable[..., Any] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function the operator ``spectrim::`` of its own name, with a fake form and a cost.

    Args:
        schema: of arguments and results.
        mutates: the arguments that it writes to.
        cost: from the operator's arguments; the entry in :data:`~spectrim.kernels.costs.COSTS`.
        fake: the results, empty, from the operator's arguments; None where there are none.
    """

    def made(function: Callable[..., Any]) -> Callable[..., Any]:
        name = f"spectrim::{function.__name__}"
        defined = torch.library.custom_op(name, function, mutates_args=mutates, schema=schema)
        defined.register_fake(fake or (lambda *args, **kwargs: None))
        COSTS[name] = cost
        return defined

    return made


def launch(kernel: Any, programs: int | tuple[int, ...], device: torch.device, *args: Any, **constants: Any) -> None:
    """Launch a kernel on a device's current stream; nothing where there is no program."""
    grid = programs if isinstance(programs, tuple) else (programs,)
    if 0 in grid:
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        # Stated, since Triton's own default is about to change.
        kernel[grid](*args, **constants, enable_fp_fusion=True)


def entrywise(aligned: bool, *lists: Sequence[Tensor]) -> dict[str, Any]:
    """The constants of a kernel over lists: block, whether all may be loaded by 16 bytes, warps."""
    aligned = aligned and all(tensor.data_ptr() % 16 == 0 for tensors in lists for tensor in tensors)
    return {"ALIGNED": aligned, "BLOCK": BLOCK, "num_warps": 8}


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """The addresses of some tensors."""
    return [tensor.data_ptr() for tensor in tensors]


def types(*lists: Sequence[Tensor]) -> list[Any]:
    """The dtypes of lists, each uniform, as Triton has them."""
    return [TYPES[tensors[0].dtype] for tensors in lists]


def form_number(taus: Tensor | None, form: str) -> int:
    """A form of shrinkage as kernels know it: 0 for none."""
    return 0 if taus is None else FORMS.index(form) + 1
