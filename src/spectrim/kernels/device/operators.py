"""How a kernel becomes an operator of torch, how it is launched, and what all kernels over lists are given."""

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

__all__ = ["Launch", "addresses", "aligned", "form_number", "launch", "launches_of", "operator"]

V = TypeVar("V")

_library = torch.library.Library("spectrim", "FRAGMENT")

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def operator(
    schema: str, *, mutates: tuple[str, ...] = (), cost: Callable[..., Cost], fake: Callable[..., Any] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function the operator ``spectrim::`` of its own name, with a fake form and a cost.

    A plain call runs the function itself: the dispatcher would copy every list, and what ``torch.library.custom_op``
    checks besides takes longer than the kernels. Compilers, fake tensors and dispatch modes get the operator.

    Args:
        schema: of arguments and results.
        mutates: the arguments that it writes to, tensors or lists of them.
        cost: from the operator's arguments; the entry in :data:`~spectrim.kernels.costs.COSTS`.
        fake: the results, empty, from the operator's arguments; None where there are none.
    """

    def made(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        places = [list(inspect.signature(function).parameters).index(argument) for argument in mutates]

        @functools.wraps(function)
        def run(*args: Any) -> Any:
            result = function(*args)
            for place in places:
                # Autograd is to notice a weight that was saved for backward and has changed since.
                torch.autograd.graph.increment_version(args[place])
            return result

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
    """True if the first of an operator's arguments holds tensors of no subclass, as fake ones are."""
    first = argument if isinstance(argument, Tensor) else argument[0]
    return type(first) is Tensor or type(first) is torch.nn.Parameter


def launch(kernel: Any, programs: int | tuple[int, ...], device: torch.device, *args: Any, **constants: Any) -> None:
    """Launch a kernel on a device's current stream; nothing where there is no program."""
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


#: What was compiled, by all that Triton compiles anew for.
_compiled: dict[tuple[Any, ...], Any] = {}


#: Which parameters of a kernel are constants to Triton. Kernels are never forgotten, so their ids are theirs.
_constants: dict[int, tuple[bool, ...]] = {}


def _launch(kernel: Any, grid: tuple[int, ...], device: int, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Launch a kernel as compiled for the likes of these arguments: Triton's own look-up takes the host longer."""
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
    found = _compiled.get(known := tuple(key))
    if found is None:
        # Stated, since Triton's own default is about to change.
        _compiled[known] = kernel[grid](*args, **constants, enable_fp_fusion=True)
        return
    rest = [constants[name] for name in kernel.arg_names[len(args) :]]
    found[(*grid, 1, 1)[:3]](*args, *rest)


def aligned(rows: Sequence[Sequence[int]]) -> bool:
    """Whether all of these addresses may be loaded from by 16 bytes."""
    bits = 0
    for row in rows:
        for address in row:
            bits |= address
    return bits % 16 == 0


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """The addresses of some tensors."""
    return [tensor.data_ptr() for tensor in tensors]


class Launch(NamedTuple):
    """Tensors of several lists that one launch takes, for the dtype of each list is uniform.

    map: which block works on what.
    rows: the addresses of the tensors, list by list.
    types: the dtype of each list, as Triton has it.
    places: where the tensors are in the lists.
    """

    map: BlockMap
    rows: list[list[int]]
    types: list[Any]
    places: list[int]

    def of(self, values: Sequence[V] | None, default: V) -> list[V]:
        """Those values of a list that belong to these tensors, or the default for each."""
        return [default] * len(self.places) if values is None else [values[place] for place in self.places]

    def launch(self, kernel: Any, table: Tensor, *args: Any) -> None:
        """Launch a kernel whose arguments begin with table, block map and number of tensors."""
        constants = {"ALIGNED": self.map.aligned and aligned(self.rows), "BLOCK": BLOCK, "num_warps": 8}
        launch(kernel, self.map.programs, table.device, table, self.map.blocks, len(self.places), *args, **constants)


def launches_of(runs: Sequence[int] | None, *lists: Sequence[Tensor]) -> Iterator[Launch]:
    """One part for each combination of dtypes: one, nearly always."""
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
    """A form of shrinkage as kernels know it: 0 for none."""
    return 0 if taus is None else FORMS.index(form) + 1
