"""Counts what a step does on fake CUDA tensors: shapes and devices, no storage, no GPU.

Every operator that reaches the dispatcher is counted and put on two clocks, the host's and the device's, which meet at
each synchronisation. What it leaves out: kernels that split a product along its inner dimension, memory that an
operator needs inside (an H100's peaks are 1 to 5 % higher), rounding by the caching allocator, an event that the host
would have to wait for; and whatever does not pass the dispatcher operator by operator, such as a CUDA graph.
"""

from __future__ import annotations

import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpu.costs import FREE, size_of, work_of
from gpu.h100 import BANDWIDTH, CALL, FLOOR, LIST, MORE, RATE, SMS, STEP, TILE, VIEW, WAIT
from gpu.stand_in import cuda_stands_in

__all__ = ["Cost", "Recorder", "fake_cuda", "measure", "measure_model", "measure_monitor"]

ANSWERS: dict[str, Any] = {"_local_scalar_dense": 1.0, "is_nonzero": True, "equal": True}
"""What the host reads of the device: any value will do."""
WAITS = {*ANSWERS, "nonzero", "masked_select", "_unique2", "_linalg_check_errors", "_linalg_eigh", "_linalg_svd"}
COPIES = ("_to_copy", "copy_")


@dataclass
class Cost:
    """Counts of one step, and seconds predicted from them.

    Attributes:
        kernels: launches.
        waits: synchronisations of host and device.
        uploads: copies from pageable host memory, waiting or not; a CUDA graph cannot be captured over one.
        bytes: read and written by kernels.
        peak: bytes of temporaries, at their most.
        held: bytes kept from step to step beside weights, gradients and the optimizer's state.
        flops: of products, by the kind of their operands.
        where: kernels by line and operator, where asked for.
        host, device: seconds until each is done; ``busy``: those in which the device works.
    """

    kernels: int = 0
    waits: int = 0
    uploads: int = 0
    bytes: int = 0
    peak: int = 0
    held: int = 0
    flops: Counter[str] = field(default_factory=Counter)
    where: Counter[tuple[str, str]] = field(default_factory=Counter)
    host: float = STEP
    device: float = 0.0
    busy: float = 0.0

    @property
    def extra(self) -> int:
        """Bytes that a step needs beyond weights, gradients and state."""
        return self.peak + self.held

    @property
    def seconds(self) -> float:
        """Until both clocks are done."""
        return max(self.host, self.device)


class Recorder(TorchDispatchMode):
    """Counts what is dispatched while it is active, from :meth:`begin` on; what lives then already is no temporary."""

    def __init__(self) -> None:
        super().__init__()
        self.cost, self.why = Cost(), False
        self.held: dict[int, int] = {}
        self.pinned: set[int] = set()
        self.now = self.base = 0

    def begin(self, why: bool = False) -> None:
        """Count from here; ``why`` keeps the lines that launch."""
        self.cost, self.why, self.base = Cost(), why, self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator on fake tensors, and count it if a CUDA tensor takes part."""
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if kwargs.get("device") == torch.device("meta"):  # what the stand-in for CUDA's guard makes of "cuda"
            kwargs = {**kwargs, "device": torch.device("cuda", 0)}
        ins = tensors_of((args, kwargs))
        if name == "is_pinned":
            return ins[0].untyped_storage()._cdata in self.pinned
        name, out = self.run(func, name, args, kwargs, ins)
        outs = tensors_of(out)
        if name != "device" and any(x.device.type == "cuda" for x in ins + outs):
            self.count(func, name, args, kwargs, ins, outs)
        for x in outs:
            if x.device.type == "cuda":
                self.hold(x.untyped_storage())
            elif name == "_pin_memory" or kwargs.get("pin_memory"):
                self.pin(x.untyped_storage())
        return out

    def run(self, func: Any, name: str, args: Any, kwargs: Any, ins: list[Tensor]) -> tuple[str, Any]:
        """The operator's name, by what CUDA does for it, and its result."""
        if name in ANSWERS:
            return name, ANSWERS[name]
        if name == "nonzero" or (
            name == "index" and any(x.dtype == torch.bool for x in ins[1:])
        ):  # as if all were taken
            return "nonzero", ins[0].new_empty(ins[-1].numel(), *ins[0].shape[ins[-1].ndim :])
        if name == "_pin_memory":
            return name, ins[0].clone()
        if name.startswith("_fused"):  # works in place, and not all of them know fake tensors
            return name, None
        return name, func(*args, **kwargs)

    def count(self, func: Any, name: str, args: Any, kwargs: Any, ins: list[Tensor], outs: list[Tensor]) -> None:
        """Add an operator to the counts and to both clocks."""
        cost = self.cost
        if func.is_view or name in FREE:
            cost.host += VIEW
            return
        work = work_of(func, name, args, kwargs, ins, outs)
        took = max([FLOOR * work.kernels, work.bytes / BANDWIDTH])
        for kind, flops in work.flops.items():
            cost.flops[kind] += flops  # type: ignore[assignment]
            entries = max((x.numel() for x in outs), default=TILE * SMS)
            took = max(took, flops / (RATE[kind] * min(1.0, entries / TILE / SMS)))
        upload, waits = self.crossing(name, args, kwargs, ins, outs)
        cost.host += CALL + LIST * work.listed + MORE * max(0, work.kernels - 1)
        cost.device, cost.busy = max(cost.device, cost.host) + took, cost.busy + took
        cost.kernels, cost.bytes = cost.kernels + work.kernels, cost.bytes + work.bytes
        cost.waits, cost.uploads = cost.waits + waits, cost.uploads + upload
        if waits:
            cost.host = max(cost.host, cost.device) + WAIT
        if self.why:
            cost.where[line_of_caller(), name + " waits" * waits + " uploads" * upload] += work.kernels

    def crossing(self, name: str, args: Any, kwargs: Any, ins: list[Tensor], outs: list[Tensor]) -> tuple[bool, bool]:
        """Whether a call copies from pageable host memory, and whether it waits for the device."""
        if name not in COPIES:
            return False, name in WAITS
        waits = not kwargs.get("non_blocking", name == "copy_" and len(args) > 2 and args[2])
        source = ins[-1]
        if source.device.type == "cpu":
            return source.untyped_storage()._cdata not in self.pinned, waits
        return False, waits and any(x.device.type == "cpu" for x in outs)

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Count a storage from its first sight until nothing holds it."""
        key = storage._cdata
        if key not in self.held:
            self.held[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self.free, key).atexit = False
            self.cost.peak = max(self.cost.peak, self.now - self.base)

    def free(self, key: int) -> None:
        """Stop counting a storage."""
        self.now -= self.held.pop(key)

    def pin(self, storage: torch.UntypedStorage) -> None:
        """Remember host memory that is pinned, while it lives."""
        self.pinned.add(storage._cdata)
        weakref.finalize(storage, self.pinned.discard, storage._cdata).atexit = False


def tensors_of(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def line_of_caller() -> str:
    """The innermost line that is neither torch's nor this package's."""
    frames = traceback.extract_stack()
    own = [f for f in frames if "site-packages" not in f.filename and "benchmarks/gpu/" not in f.filename]
    frame = (own or frames)[-1]
    return f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno}"


@contextmanager
def fake_cuda() -> Iterator[Recorder]:
    """Make CUDA tensors fake, and count what is done with them."""
    with cuda_stands_in(), FakeTensorMode(), Recorder() as recorder:
        yield recorder


def measure(
    make: Callable[[list[nn.Parameter]], Optimizer],
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
    why: bool = False,
    warm: int = 2,
) -> Cost:
    """The cost of a step of ``make(params)``, after ``warm`` that are not counted: state is made at the first."""
    with fake_cuda() as recorder:
        params = parameters(shapes, dtype)
        return count_step(recorder, make(params), params, why, warm)


def measure_model(build: Callable[[], nn.Module], make: Callable[[nn.Module], Optimizer]) -> Cost:
    """The cost of a step of ``make(build())``: of all parameters of a model, embeddings and vectors among them."""
    with fake_cuda() as recorder:
        with torch.device("cuda"):
            model = build()
        params = list(model.parameters())
        for param in params:
            param.grad = torch.empty_like(param)
        return count_step(recorder, make(model), [*params, *model.buffers()])


def count_step(
    recorder: Recorder, optimizer: Optimizer, params: Sequence[Tensor], why: bool = False, warm: int = 2
) -> Cost:
    for _ in range(warm):
        optimizer.step()
    recorder.begin(why)
    own = size_of(unique([*params, *(p.grad for p in params), *tensors_of(list(optimizer.state.values()))]))
    before = recorder.now
    optimizer.step()
    recorder.cost.held = max(0, before - own)
    return recorder.cost


def measure_monitor(
    make: Callable[[list[nn.Parameter]], Optimizer], shapes: Sequence[tuple[int, ...]], steps: int = 20
) -> Cost:
    """What a :class:`spectrim.SpectralMonitor` adds to a step that it does not measure: the most of any, over so many.

    So many steps and not one, since what every step leaves is read only now and then.
    """
    import spectrim

    worst = Cost(host=0.0)
    with fake_cuda() as recorder:
        params = parameters(shapes, torch.float32)
        model = nn.Module()
        for index, param in enumerate(params):
            layer = nn.Linear(1, 1, bias=False, device="meta")
            layer.weight = param
            model.add_module(f"layer{index}", layer)
        optimizer = make(params)
        for _ in range(2):
            optimizer.step()
        recorder.begin()
        optimizer.step()
        alone = recorder.cost
        monitor = spectrim.SpectralMonitor(model, optimizer, every=10**9, out=None)
        recorder.begin()  # what comes is no part of the step alone
        optimizer.step()  # the first sends what all later ones use
        for _ in range(steps):
            recorder.begin()
            optimizer.step()
            with_monitor = recorder.cost
            for name in ("kernels", "waits", "uploads", "host", "busy"):
                added = getattr(with_monitor, name) - getattr(alone, name)
                setattr(worst, name, max(getattr(worst, name), added))
        monitor.close()
    return worst


def parameters(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.empty(shape, dtype=dtype, device="cuda")) for shape in shapes]
    for param in params:
        param.grad = torch.empty_like(param)
    return params


def unique(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """One CUDA tensor of each storage."""
    return list({x.untyped_storage()._cdata: x for x in tensors if x is not None and x.device.type == "cuda"}.values())
