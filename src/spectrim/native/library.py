"""The compiled library, loaded at its first use, and whether there is one.

``SPECTRIM_NATIVE=0`` in the environment turns it off.
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import c_double, c_float, c_int, c_long, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from .compiler import NoLibraryError, built_library

__all__ = ["addresses", "available", "library", "serves", "unavailable_because", "written"]

_POINTER = c_void_p

#: Result and arguments of every function of the library.
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "use_threads_of": (None, [_POINTER]),
    "partial_sums": (c_long, [c_long]),
    "sum_squares": (c_double, [c_int, _POINTER, c_long, _POINTER]),
    "sum_roots": (c_double, [c_int, _POINTER, c_long, _POINTER]),
    "adam_step": (None, [c_int, *[_POINTER] * 4, c_long, c_int, _POINTER]),
    "adam_direction": (None, [c_int, *[_POINTER] * 4, c_long, _POINTER]),
    "momentum_step": (None, [c_int, *[_POINTER] * 3, c_long, c_float, c_int, c_int, c_int]),
    "apply_update": (None, [c_int, *[_POINTER] * 2, c_long, c_float, c_float]),
    "gram_floats": (c_long, [c_long]),
    "gram_matrix": (None, [c_int, _POINTER, *[c_long] * 4, c_float, *[_POINTER] * 2, c_long, *[_POINTER] * 2]),
    "inverse_floats": (c_long, [c_long]),
    "add_resolvents": (None, [c_int, *[_POINTER] * 2, c_long, *[_POINTER] * 2, *[c_long] * 2, *[_POINTER] * 2]),
    "spike_floats": (c_long, [c_long] * 3),
    "spike_doubles": (c_long, [c_long] * 2),
    "follow_spike": (c_int, [c_int, *[_POINTER] * 5, c_long, _POINTER, *[c_long] * 3, *[_POINTER] * 3]),
    "apply_low_rank": (None, [c_int, *[_POINTER] * 4, *[c_long] * 4, c_float, c_float]),
}


@dataclass(frozen=True)
class _Found:
    library: ctypes.CDLL | None
    reason: str | None


@functools.cache
def _found() -> _Found:
    if os.environ.get("SPECTRIM_NATIVE", "1").lower() in ("0", "false", "off", "no"):
        return _Found(None, "SPECTRIM_NATIVE turns it off")
    try:
        found = ctypes.CDLL(str(built_library()))
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    except (NoLibraryError, OSError, AttributeError) as error:
        return _Found(None, str(error))
    # torch loads its OpenMP runtime for all to see. Another one, such as Intel's, serves this entry point too.
    region = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    found.use_threads_of(None if region is None else ctypes.cast(region, _POINTER))
    return _Found(found, None)


def available() -> bool:
    """Whether the native kernels are used on this machine. The first call may compile them, in about a second."""
    return _found().library is not None


def unavailable_because() -> str | None:
    """Why there are no native kernels here, in a few words; None where there are."""
    return _found().reason


def library() -> ctypes.CDLL:
    """The library, where :func:`available` says that there is one."""
    found = _found().library
    assert found is not None
    return found


def serves(*tensors: Tensor) -> bool:
    """Whether kernels may work on the storage of these: plain float32 tensors on the host, which nothing differentiates
    or traces, each one run of memory in the same order of entries."""
    if torch.compiler.is_compiling():
        return False
    first = tensors[0]
    for tensor in tensors:
        if (
            type(tensor) not in (Tensor, nn.Parameter)
            or tensor.dtype != torch.float32
            or tensor.device.type != "cpu"
            or tensor.stride() != first.stride()
            or tensor.shape != first.shape
            or (tensor.requires_grad and torch.is_grad_enabled())
        ):
            return False
    in_order = first.is_contiguous() or (first.ndim == 2 and first.mT.is_contiguous())
    return in_order and torch._C._functorch.peek_interpreter_stack() is None and available()


def addresses(*tensors: Tensor) -> list[int]:
    """Where the entries of tensors begin."""
    return [tensor.data_ptr() for tensor in tensors]


def written(*tensors: Tensor) -> None:
    """Tell autograd that a kernel has written to these, as torch's own operators do."""
    increment_version([tensor for tensor in tensors if not tensor.is_inference()])
