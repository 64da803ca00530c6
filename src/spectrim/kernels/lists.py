"""Lists of tensors: grouping, conditions of torch's fused kernels, skipping a step by its flag, learning rates."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = [
    "Found",
    "Number",
    "clear_if_skipped",
    "fused_serves",
    "fused_sgd",
    "grouped",
    "held",
    "like",
    "listed",
    "of_equal_numbers",
    "rates",
    "spread",
    "with_zeros",
    "working",
]

#: A Python number, or a scalar tensor on the device.
Number = float | Tensor

#: The skip flag: None, or a float32 scalar that is 1 if the whole step is skipped, else 0.
Found = Tensor | None

N = TypeVar("N", float, Number)
V = TypeVar("V")
K = TypeVar("K", bound=Hashable)

FUSED_DEVICES = ("cpu", "cuda")


def grouped(items: Iterable[V], key: Callable[[V], K]) -> dict[K, list[V]]:
    """Lists of the items with equal keys, in order."""
    found: dict[K, list[V]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def fused_serves(*lists: Sequence[Tensor]) -> bool:
    """True if torch's fused kernels take these lists: one dtype and device, equal shapes and memory layouts.

    False while a compiler traces, which can fuse the formula itself but not look into these kernels.
    """
    if torch.compiler.is_compiling():
        return False
    first = lists[0][0]
    dtype, device = first.dtype, first.device
    if dtype not in (torch.float32, torch.float64) or device.type not in FUSED_DEVICES:
        return False
    everything = [tensor for tensors in lists for tensor in tensors]
    if {tensor.dtype for tensor in everything} != {dtype} or {tensor.device for tensor in everything} != {device}:
        return False
    if {tensor.is_neg() for tensor in everything} != {False} or not same_shapes(lists):
        return False
    return {tensor.is_contiguous() for tensor in everything} == {True} or lie_alike(lists)


def fused_sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    *,
    lr: Number,
    found: Found,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> None:
    """SGD's step by torch's fused kernel; without momentum, ``buffers`` is empty."""
    torch._fused_sgd_(
        list(params),
        list(grads),
        list(buffers),
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,
        dampening=dampening,
        nesterov=nesterov,
        maximize=False,
        is_first_step=False,
        found_inf=found,
    )


def same_shapes(lists: Sequence[Sequence[Tensor]]) -> bool:
    """True if tensors at the same index of the lists have the same shape."""
    shapes = [tensor.shape for tensor in lists[0]]
    return all([tensor.shape for tensor in tensors] == shapes for tensors in lists[1:])


def lie_alike(lists: Sequence[Sequence[Tensor]]) -> bool:
    """True if tensors at the same index of the lists are dense with equal strides."""
    return all(
        is_dense(tensors[0]) and all(tensor.stride() == tensors[0].stride() for tensor in tensors)
        for tensors in zip(*lists, strict=True)
    )


def is_dense(tensor: Tensor) -> bool:
    """True if a tensor's entries fill contiguous memory, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def held(decay: float, found: Found) -> float | Tensor:
    """A decay that is 1 if the step is skipped, so that with a zero gradient the state stays as it is."""
    if found is None:
        return decay
    # Float64, so that float32 arithmetic gives the same result as with a Python number.
    return torch.where(found > 0, torch.ones((), dtype=torch.float64, device=found.device), decay)


def with_zeros(tensors: Sequence[Tensor], found: Found) -> list[Tensor]:
    """The tensors, or zeros if the step is skipped."""
    if found is None:
        return list(tensors)
    skip = found > 0
    return [torch.where(skip, 0.0, tensor) for tensor in tensors]


def clear_if_skipped(tensors: Sequence[Tensor], found: Found) -> None:
    """Set tensors to zero if the step is skipped, to remove NaNs from the gradient."""
    if found is not None:
        skip = found > 0
        for tensor in tensors:
            tensor.masked_fill_(skip, 0.0)


def working(tensor: Tensor) -> torch.dtype:
    """The dtype of arithmetic with a tensor: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def like(number: Number, tensor: Tensor) -> Number:
    """Convert a number to a tensor's dtype if it is a tensor."""
    return number.to(tensor.dtype) if isinstance(number, Tensor) else number


def spread(value: N | Sequence[N], count: int) -> list[N]:
    """One value for each of ``count`` tensors, from one for all or a list of them."""
    if not isinstance(value, (list, tuple)):
        return [value] * count  # type: ignore[list-item]
    if len(value) != count:
        raise ValueError(f"{len(value)} values for {count} tensors: expected one for each, or one for all")
    return list(value)


def listed(values: Sequence[V] | None) -> list[V] | None:
    """A list, which an operator can take, or None."""
    return None if values is None else list(values)


def of_equal_numbers(lrs: Sequence[Number], decays: Sequence[float]) -> Iterator[tuple[Number, float, list[int]]]:
    """Group equal pairs of learning rate and decay: each pair with the indices that have it."""
    places: dict[tuple[object, float], list[int]] = {}
    for index, (lr, decay) in enumerate(zip(lrs, decays, strict=True)):
        # Tensors are compared by identity, since comparing their values would read the device.
        places.setdefault((id(lr) if isinstance(lr, Tensor) else lr, decay), []).append(index)
    for chosen in places.values():
        yield lrs[chosen[0]], decays[chosen[0]], chosen


def rates(lrs: Sequence[Number]) -> tuple[list[float], list[Tensor], list[int]]:
    """Learning rates as an operator can take them.

    Returns:
        The numbers, 0 for a tensor; the tensors; and each rate's index among the tensors, −1 for a number.
    """
    tensors: list[Tensor] = []
    places = []
    for lr in lrs:
        place = -1
        if isinstance(lr, Tensor):
            place = next((place for place, tensor in enumerate(tensors) if tensor is lr), len(tensors))
            if place == len(tensors):
                tensors.append(lr)
        places.append(place)
    numbers = [0.0 if isinstance(lr, Tensor) else float(lr) for lr in lrs]
    return numbers, [tensor.float() for tensor in tensors], places
