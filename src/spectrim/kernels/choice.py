"""Decides whether the eager or the Triton form of an operation runs.

The Triton form runs if

1. it is switched on: by :class:`use`, else by the environment variable SPECTRIM_KERNELS=1 (or 0), else because it was
   measured to be faster on this device (:data:`MEASURED`);
2. Triton is installed, and the tensors are on a CUDA or ROCm device. Fake tensors reach the operator's fake form.
   Triton's interpreter (TRITON_INTERPRET=1, set before Triton is imported) takes CPU tensors instead;
3. every tensor is in float32, bfloat16 or float16, and tensors that belong together are dense with equal strides.

Otherwise the eager form runs. ``torch.compile`` does not change this: the operators are opaque to it, and declare the
tensors to which they write.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

from .lists import lie_alike, same_shapes

__all__ = ["MEASURED", "kernel_runs", "switched_on", "use"]

#: Compute capability of NVIDIA devices -> operations whose kernel was measured to be faster: on an H200, docs/gpu.md.
MEASURED: dict[tuple[int, int], frozenset[str]] = {
    (9, 0): frozenset(
        {
            "adam_directions",
            "adamw_step",
            "ademamix_directions",
            "apply_updates",
            "clip_scales",
            "combine",
            "frobenius_norms",
            "largest_magnitudes",
            "magnitudes_and_roots",
            "mean_roots",
            "momentum_directions",
            "program_numbers",
            "settle",
            "spike_step",
            "symmetric_product",
        }
    )
}

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})

_installed = importlib.util.find_spec("triton") is not None
_interpreted = os.environ.get("TRITON_INTERPRET") == "1"


def _from_environment() -> bool | None:
    value = os.environ.get("SPECTRIM_KERNELS", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"SPECTRIM_KERNELS={value!r} in the environment: expected 1, 0 or nothing")
    return value == "1" if value else None


_switch: bool | None = _from_environment()


class use:  # noqa: N801 (used like a function)
    """Switch the Triton kernels on (True), off (False), or back to the default rule (None), for the whole process.

    The call has effect at once. As a context manager, ``with use(True): ...``, it restores the previous setting.
    """

    def __init__(self, kernels: bool | None) -> None:
        global _switch
        if kernels not in (True, False, None):
            raise ValueError(f"kernels={kernels!r}: expected True, False or None")
        self._before = _switch
        _switch = kernels

    def __enter__(self) -> use:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _switch
        _switch = self._before


def switched_on(kernel: str, device: torch.device) -> bool:
    """True if the Triton form of an operation is switched on for a device.

    Args:
        kernel: the operation's name, as in :data:`MEASURED`.
    """
    if _switch is False or not _installed:
        return False
    if device.type != ("cpu" if _interpreted else "cuda"):
        return False
    return _switch is True or kernel in MEASURED.get(_capability(device.index), ())


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    """The compute capability of a device; (0, 0) for ROCm, and for fake tensors without a device."""
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() and not torch.version.hip else (0, 0)


def kernel_runs(kernel: str, *lists: Sequence[Tensor], scalars: Sequence[Tensor] = ()) -> bool:
    """True if the Triton form of an operation runs on these lists.

    Args:
        kernel: as for :func:`switched_on`.
        lists: lists of equal length; tensors at the same index have one shape.
        scalars: float32 tensors of one entry, which must be on the same device.
    """
    if not lists[0] or not switched_on(kernel, lists[0][0].device):
        return False
    device = lists[0][0].device
    if scalars and (
        {tensor.dtype for tensor in scalars} != {torch.float32} or {tensor.device for tensor in scalars} != {device}
    ):
        return False
    everything = [tensor for tensors in lists for tensor in tensors]
    if not {tensor.dtype for tensor in everything} <= FLOATS or {tensor.device for tensor in everything} != {device}:
        return False
    return same_shapes(lists) and ({tensor.is_contiguous() for tensor in everything} == {True} or lie_alike(lists))
