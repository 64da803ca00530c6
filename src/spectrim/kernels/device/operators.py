"""Registers functions as torch operators, and launches kernels."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..costs import COSTS, Cost
from ..runs import triples
from ..shrinking import FORMS
from ..table import BLOCK, BlockMap, block_map, by_dtypes, map_of_pieces, pieces_of

__all__ = ["Launch", "addresses", "addresses_at", "aligned", "form_number", "launch", "launches_of", "operator"]

V = TypeVar("V")

_library = torch.library.Library("spectrim", "FRAGMENT")

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def operator(
    *, mutates: tuple[str, ...] = (), cost: Callable[..., Cost], fake: Callable[..., Any] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the operator ``spectrim::<name>``, with a fake form and a cost.

    Plain calls run the function directly, since the dispatcher copies every list and the checks of
    ``torch.library.custom_op`` take longer than the kernels. Compilers, fake tensors and dispatch modes call the
    operator.

    Args:
        mutates: names of the arguments, tensors or lists, that it overwrites.
        cost: computes the cost from the arguments; the entry in :data:`~spectrim.kernels.costs.COSTS`.
        fake: makes empty results from the arguments; None if there are no results.
    """

    def made(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        places = [list(inspect.signature(function).parameters).index(argument) for argument in mutates]

        @functools.wraps(function)
        def run(*args: Any) -> Any:
            result = function(*args)
            for place in places:
                # Lets autograd detect the change of a weight that was saved for backward.
                torch.autograd.graph.increment_version(args[place])
            return result

        schema = torch.library.infer_schema(function, mutates_args=mutates)
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"spectrim::{name}", fake or (lambda *args: None), lib=_library)
        COSTS[f"spectrim::{name}"] = cost
        overload = getattr(torch.ops.spectrim, name).default

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or not _is_plain(args[0]):
                return overload(*args)
            return run(*args)

        return call

    return made


def _is_plain(argument: Tensor | Sequence[Tensor]) -> bool:
    """True if an operator's first argument has plain tensors, not a subclass such as fake tensors."""
    first = argument if isinstance(argument, Tensor) else argument[0]
    return type(first) is Tensor or type(first) is torch.nn.Parameter


def launch(kernel: Any, programs: int | tuple[int, ...], device: torch.device, *args: Any, **constants: Any) -> None:
    """Launch a kernel on a device's current stream; do nothing if the grid is empty."""
    grid = programs if isinstance(programs, tuple) else (programs,)
    if 0 in grid:
        return
    if device.type != "cuda":
        kernel[grid](*args, **constants, enable_fp_fusion=True)
    elif (current := torch.cuda.current_device()) == device.index or device.index is None:
        _launch(kernel, grid, current, args, constants)
    else:
        with torch.cuda.device(device):
            _launch(kernel, grid, device.index, args, constants)


#: Compiled kernels, by the properties of arguments on which Triton's specialisation depends.
_compiled: dict[tuple[Any, ...], Any] = {}


#: id of a kernel -> for each parameter, True if it is a constexpr. Kernels are never deleted, so ids are unique.
_constants: dict[int, tuple[bool, ...]] = {}


def _launch(kernel: Any, grid: tuple[int, ...], device: int, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Launch a kernel from :data:`_compiled`, whose look-up is faster than Triton's."""
    key: list[Any] = [id(kernel), device, *constants.values()]
    if id(kernel) not in _constants:
        _constants[id(kernel)] = tuple(parameter.is_constexpr for parameter in kernel.params)
    addresses = 0
    for value, constant in zip(args, _constants[id(kernel)], strict=False):
        kind = type(value)
        if constant:
            key.append(value)
        elif kind is int:
            key.append((value == 1, value % 16 == 0, value >= 2**31))
        elif kind is not float:
            if kind is Tensor or isinstance(value, Tensor):
                addresses |= value.data_ptr()
                value = value.dtype
            key.append(value)
    if addresses % 16:
        kernel[grid](*args, **constants, enable_fp_fusion=True)
        return
    compiled = _compiled.get(known := tuple(key))
    if compiled is None:
        # enable_fp_fusion is given since Triton's default will change.
        _compiled[known] = kernel[grid](*args, **constants, enable_fp_fusion=True)
        return
    rest = [constants[name] for name in kernel.arg_names[len(args) :]]
    compiled[(*grid, 1, 1)[:3]](*args, *rest)


def aligned(rows: Sequence[Sequence[int]]) -> bool:
    """True if all addresses are multiples of 16."""
    bits = 0
    for row in rows:
        for address in row:
            bits |= address
    return bits % 16 == 0


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """The addresses of tensors."""
    return [tensor.data_ptr() for tensor in tensors]


def addresses_at(tensors: Sequence[Tensor], places: Sequence[int]) -> list[int]:
    """The address of the tensor at each place, 0 for a negative place."""
    return [tensors[place].data_ptr() if place >= 0 else 0 for place in places]


class Launch(NamedTuple):
    """The tensors of one launch. All tensors of a list have the same dtype.

    Attributes:
        map: the block map.
        rows: the tensors' addresses, by list.
        types: Triton's dtypes of the lists.
        places: indices of the tensors in the original lists.
    """

    map: BlockMap
    rows: list[list[int]]
    types: list[Any]
    places: list[int]

    def of(self, values: Sequence[V] | None, default: V) -> list[V]:
        """The values of these tensors, or as many defaults."""
        return [default] * len(self.places) if values is None else [values[place] for place in self.places]

    def launch(self, kernel: Any, table: Tensor, *args: Any) -> None:
        """Launch a kernel whose first arguments are the table, the block map and the number of tensors."""
        constants = {"ALIGNED": self.map.aligned and aligned(self.rows), "BLOCK": BLOCK, "num_warps": 8}
        launch(kernel, self.map.programs, table.device, table, self.map.blocks, len(self.places), *args, **constants)


def launches_of(runs: Sequence[int] | None, *lists: Sequence[Tensor]) -> Iterator[Launch]:
    """One launch per combination of dtypes, usually one."""
    device = lists[0][0].device
    sizes = [tensor.numel() for tensor in lists[0]]
    if all(tensor.dtype == tensors[0].dtype for tensors in lists for tensor in tensors):
        map_ = block_map(sizes, triples(runs), device)
        kinds = [TYPES[tensors[0].dtype] for tensors in lists]
        yield Launch(map_, [addresses(tensors) for tensors in lists], kinds, list(range(len(sizes))))
        return
    for uniform, kept, places in by_dtypes(pieces_of(sizes, triples(runs)), *lists):
        kinds = [TYPES[tensors[0].dtype] for tensors in uniform]
        yield Launch(map_of_pieces(kept, device), [addresses(tensors) for tensors in uniform], kinds, places)


def form_number(taus: Tensor | None, form: str) -> int:
    """The number by which kernels know a form of shrinkage; 0 for no shrinkage."""
    return 0 if taus is None else FORMS.index(form) + 1
