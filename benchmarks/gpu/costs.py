"""What CUDA does for one operator: kernels, bytes, FLOPs of products by kind.

Numbers of kernels are those that torch 2.11 launches, by its sources and by the profile of an H100. Operators that are
not named here launch one. A custom operator of this project launches one too, unless :data:`COSTS` knows better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["COSTS", "FREE", "Work", "size_of", "work_of"]


@dataclass
class Work:
    """What one operator makes the device do; ``listed`` is the number of tensors in its lists, which cost the host."""

    kernels: int
    bytes: int
    flops: dict[str, float] = field(default_factory=dict)
    listed: int = 0


COSTS: dict[str, Callable[..., tuple[int, int, Mapping[str, float]]]] = {}
"""The cost of custom operators, by name ("spectrim::name"): a function of the operator's arguments to launches, bytes
read and written, and FLOPs of products by kind ("float32", "tf32", "float16", ...). :mod:`spectrim.kernels.costs` has
more of the same form. An operator that is in neither is one kernel, which reads every tensor and writes what the schema
says it does."""

FREE = {"detach", "alias", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
FREE |= {"_unsafe_view", "resize_", "is_pinned", "record_stream"}
"""Operators that launch nothing though they are no views."""

KERNELS = {"dot": 2, "diag_embed": 2, "eye": 2, "nonzero": 4, "cholesky_inverse": 4, "_linalg_eigh": 30}
QR = 22
"""Kernels of cuSOLVER's QR for each matrix of a stack, tall and of few columns."""
PANEL = 32
"""Columns that batched triangular factorisations and solves take at a time."""
OVERWRITE = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_", "normal_", "uniform_", "bernoulli_"}
"""In-place operators that do not read what they write to."""

# ATen/native/cuda/MultiTensorApply.cuh: what one multi-tensor kernel holds.
CHUNK, BLOCKS = 65536, 320
MOST = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
MOST_WITH_NUMBERS = {1: 96, 2: 64, 3: 48, 4: 36, 5: 30}


def work_of(
    func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], ins: Sequence[Tensor], outs: Sequence[Tensor]
) -> Work:
    """The work of one call that is neither a view nor free."""
    if func.namespace == "spectrim":
        return custom(func, args, kwargs, ins, outs)
    given = kwargs.get("out")
    overwritten = [given] if isinstance(given, Tensor) else ins[:1] if name in OVERWRITE and ins[:1] == outs[:1] else []
    moved = size_of(ins) - size_of(overwritten) + size_of(outs)
    if name.startswith(("_foreach", "_fused")):
        return listed(name, args, moved)
    if name in ("cat", "stack"):
        return Work(math.ceil(len(args[0]) / 128), moved, listed=len(args[0]))
    if (plain := name.rstrip("_")) in ("mm", "bmm", "addmm", "baddbmm"):
        return product(plain, plain != name, args, kwargs, moved, outs[0])
    return Work(kernels_of(name, outs), moved)


def size_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of memory behind tensors; what is expanded is read once."""
    return sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)


def kernels_of(name: str, outs: Sequence[Tensor]) -> int:
    if name == "linalg_qr":
        return QR * math.prod(outs[0].shape[:-2])
    if name == "linalg_cholesky_ex":
        return 3 + math.ceil(outs[0].shape[-1] / PANEL)  # a copy, the pointers, the other triangle
    if name == "linalg_solve_triangular":
        return 3 + math.ceil(min(outs[0].shape[-2:]) / PANEL)  # a copy, the pointers of both
    return KERNELS.get(name, 1)


def product(name: str, in_place: bool, args: Sequence[Any], kwargs: Mapping[str, Any], moved: int, out: Tensor) -> Work:
    adds = name in ("addmm", "baddbmm")
    left = args[1 if adds else 0]
    # A summand of the result's own shape is copied there first.
    copies = adds and not in_place and args[0].ndim == out.ndim and kwargs.get("beta", 1) != 0
    return Work(1 + copies, moved, {kind_of(left): 2.0 * out.numel() * left.shape[-1]})


def kind_of(operand: Tensor) -> str:
    """The kind of product that torch makes of an operand, as the precision set for float32 says."""
    kind = str(operand.dtype).removeprefix("torch.")
    return "tf32" if kind == "float32" and torch.backends.cuda.matmul.fp32_precision == "tf32" else kind


# -- Lists ------------------------------------------------------------------------------------------------------------


def listed(name: str, args: Sequence[Any], moved: int) -> Work:
    fused = name.startswith("_fused")
    # Step counts of fused optimizers, the sixth argument, are no list that the kernel walks.
    given = [x for x in args[: 5 if fused else None] if isinstance(x, (list, tuple)) and x]
    lists = [x for x in given if isinstance(x[0], Tensor)]
    same = share_layout(lists, any_dtype=name == "_foreach_copy_")
    if fused and not same:
        raise RuntimeError(f"{name}: expected lists of one dtype and memory layout, as CUDA's kernel does")
    written = lists[:1] + lists[2:] * fused  # all but the gradients
    moved += name.endswith("_") * sum(map(size_of, written)) - (name in OVERWRITE) * size_of(lists[0])
    if not same:
        return Work(len(lists[0]), moved, listed=len(lists[0]))
    most = (MOST if len(given) == len(lists) else MOST_WITH_NUMBERS)[min(len(lists), 5)]
    reductions = 2 * (name in ("_foreach_norm", "_foreach_max"))
    return Work(launches_of_lists(lists[0], most) + reductions, moved, listed=len(lists[0]))


def share_layout(lists: Sequence[Sequence[Tensor]], any_dtype: bool) -> bool:
    """Whether one kernel takes the lists; torch goes tensor by tensor otherwise."""
    if any(x.dtype != (some if any_dtype else lists[0])[0].dtype for some in lists for x in some):
        return False
    return all(
        is_dense(first) and all(x.stride() == first.stride() for x in rest) for first, *rest in zip(*lists, strict=True)
    )


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's entries fill one run of memory, in whatever order of dimensions."""
    expected = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length != 1:
            if stride != expected:
                return False
            expected *= length
    return True


def launches_of_lists(tensors: Sequence[Tensor], most: int) -> int:
    """Kernels of one multi-tensor call: each holds up to 320 blocks of 65,536 entries, and so many tensors."""
    held = blocks = count = 0
    for tensor in tensors:
        held += 1
        for _ in range(max(1, math.ceil(tensor.numel() / CHUNK))):
            blocks += 1
            if blocks == BLOCKS:
                count, blocks, held = count + 1, 0, 1
        if held == most and blocks:
            count, blocks, held = count + 1, 0, 0
    return count + bool(blocks)


# -- Custom operators -------------------------------------------------------------------------------------------------


def custom(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], ins: Sequence[Tensor], outs: Sequence[Tensor]
) -> Work:
    """The cost of an operator of this project, by :data:`COSTS` or else by its schema."""
    declared = func._schema.arguments
    lists = [x for x in (*args, *kwargs.values()) if isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor)]
    longest = max(map(len, lists), default=0)
    if cost := known_cost(func._schema.name):
        launches, moved, flops = cost(*args, **kwargs)
        return Work(launches, moved, dict(flops), longest)
    given = {argument.name: value for argument, value in zip(declared, args, strict=False)} | dict(kwargs)
    written = [given.get(x.name) for x in declared if x.alias_info is not None and x.alias_info.is_write]
    mutated = [x for x in tree_leaves(written) if isinstance(x, Tensor)]
    return Work(1, size_of(ins) + size_of(mutated) + size_of(outs), listed=longest)


def known_cost(name: str) -> Callable[..., tuple[int, int, Mapping[str, float]]] | None:
    """The function that tells the cost of an operator: :data:`COSTS`, or what its own module says."""
    if name in COSTS:
        return COSTS[name]
    try:
        costs = import_module("spectrim.kernels.costs").COSTS
    except ModuleNotFoundError:
        return None
    found: Callable[..., tuple[int, int, Mapping[str, float]]] | None = costs.get(name)
    return found


def one_product(left: Tensor, right: Tensor) -> tuple[int, int, Mapping[str, float]]:
    """The cost of a product whose rounding no global switch changes."""
    entries = left.numel() // left.shape[-1] * right.shape[-1]
    moved = size_of((left, right)) + entries * left.element_size()
    return 1, moved, {str(left.dtype).removeprefix("torch."): 2.0 * entries * left.shape[-1]}


COSTS["spectrim::float32_product"] = one_product
