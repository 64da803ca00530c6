"""What a machine without CUDA lacks for a step on fake CUDA tensors, put in place for a while."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["cuda_stands_in"]

CUDA, META = 1, 14  # c10::DeviceType


@contextmanager
def cuda_stands_in() -> Iterator[None]:
    """Let code run that asks torch.cuda for streams, events and the device's kind: it is told of an idle H100."""
    stream = Idle()
    properties = SimpleNamespace(
        name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30
    )
    answers: dict[str, Any] = {
        "Event": Idle,
        "Stream": Idle,
        "current_stream": lambda *_: stream,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "is_current_stream_capturing": lambda: False,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties,
        "get_device_name": lambda *_: properties.name,
    }
    with guard(), ExitStack() as patches:
        for name, answer in answers.items():
            patches.enter_context(mock.patch.object(torch.cuda, name, answer))
        patches.enter_context(mock.patch.object(torch, "tensor", tensor_that_may_be_pinned(torch.tensor)))
        patches.enter_context(mock.patch.object(FakeTensor, "tolist", read_once))
        yield


@contextmanager
def guard() -> Iterator[None]:
    """Let a CPU build index and copy fake CUDA tensors, for which it lacks a device guard: meta's, which does
    nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 21).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[CUDA]
    guards[CUDA] = before or guards[META]
    try:
        yield
    finally:
        guards[CUDA] = before


class Idle:
    """A stream or an event with nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or Idle()


def tensor_that_may_be_pinned(original: Any) -> Any:
    """torch.tensor, which refuses to pin before any mode sees it where there is no accelerator."""

    def tensor(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        made: Tensor = original(*args, **kwargs)
        return made.pin_memory() if pin_memory else made

    return tensor


def read_once(tensor: Tensor) -> Any:
    """One copy to the host and any values, as a real tensor's ``tolist`` reads; a fake one reads entry by entry."""
    tensor.cpu()
    values: Any = 1.0 if tensor.is_floating_point() else 1
    for length in reversed(tensor.shape):
        values = [values] * length
    return values
