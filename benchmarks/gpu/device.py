"""Times, memory and waits on one device: CUDA where it is there, else the CPU, on which everything is rehearsed."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["Device", "OutOfTimeError"]

Call = Callable[[], Any]


class OutOfTimeError(Exception):
    """The time given to all measurements is over."""


class Device:
    """A device, and until when it may be used.

    Args:
        name: "cuda", "cuda:1" or "cpu".
        small: rehearse: the smallest problems, and as few repeats as there can be.
        seconds: after these no measurement starts.
    """

    def __init__(self, name: str, *, small: bool = False, seconds: float = 340.0) -> None:
        self.torch = torch.device(name)
        self.cuda = self.torch.type == "cuda"
        self.small = small
        self._deadline = time.monotonic() + seconds
        # It says that it misses some waits; a captured graph, checked beside it, does not.
        warnings.filterwarnings("ignore", message=".*[Ss]ynchronization debug mode.*")

    def check_time(self) -> None:
        """Raise :class:`OutOfTimeError` where it is."""
        if time.monotonic() > self._deadline:
            raise OutOfTimeError("not measured: out of time")

    def synchronize(self) -> None:
        """Wait until all that was asked of the device is done."""
        if self.cuda:
            torch.cuda.synchronize(self.torch)

    def ms(self, call: Call, *, warm: int = 2, seconds: float = 1.0) -> float:
        """The median time of a call: of three at least, ten at most, and no more once the seconds are over."""
        for _ in range(1 if self.small else warm):
            call()
        self.synchronize()
        times: list[float] = []
        began = time.monotonic()
        while len(times) < (1 if self.small else 3) or (
            len(times) < 10 and not self.small and time.monotonic() - began < seconds
        ):
            times.append(self._once(call))
        return statistics.median(times)

    def _once(self, call: Call) -> float:
        if not self.cuda:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last)

    def host_ms(self, call: Call) -> float:
        """The time until a call returns, whether or not the device is done."""
        self.synchronize()
        start = time.perf_counter()
        call()
        took = 1e3 * (time.perf_counter() - start)
        self.synchronize()
        return took

    def waits(self, call: Call) -> str:
        """Why a call waits for the device, as far as torch can tell; empty where it does not."""
        if not self.cuda:
            call()
            return ""
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return first_line(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return ""

    def extra_bytes(self, call: Call) -> int | None:
        """The most memory that a call takes beyond what was there before."""
        if not self.cuda:
            call()
            return None
        self.synchronize()
        before = torch.cuda.memory_allocated(self.torch)
        torch.cuda.reset_peak_memory_stats(self.torch)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.torch) - before

    def kernels(self, call: Call) -> int | None:
        """Launches of a call, copies and fills among them."""
        if not self.cuda:
            call()
            return None
        from torch.profiler import ProfilerActivity, profile

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with profile(activities=[ProfilerActivity.CUDA]) as found:
                call()
                self.synchronize()
            return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in found.events())

    def captured(self, call: Call, *, warm: int = 3) -> Call:
        """A call as a CUDA graph, after so many that count; on a CPU the call itself."""
        if not self.cuda:
            for _ in range(warm):
                call()
            return call
        stream = torch.cuda.Stream(self.torch)
        stream.wait_stream(torch.cuda.current_stream(self.torch))
        with torch.cuda.stream(stream):
            for _ in range(warm):
                call()
        torch.cuda.current_stream(self.torch).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    @contextmanager
    def clean(self) -> Iterator[None]:
        """Give back what the work inside held."""
        try:
            yield
        finally:
            gc.collect()
            if self.cuda:
                torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}"
