"""How a kernel becomes an operator of torch, how it is launched, and what all kernels over lists are given."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton.language as tl
from torch import Tensor

from ..costs import COSTS, Cost
from ..runs import triples
from ..shrinking import FORMS
from ..table import BLOCK, BlockMap, block_map, by_dtypes, pieces_of

__all__ = ["Part", "addresses", "aligned", "form_number", "launch", "operator", "parts_of"]

V = TypeVar("V")

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


class Part(NamedTuple):
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
        return [default if values is None else values[place] for place in self.places]

    def launch(self, kernel: Any, table: Tensor, *args: Any) -> None:
        """Launch a kernel whose arguments begin with table, block map and number of tensors."""
        constants = {"ALIGNED": self.map.aligned and aligned(self.rows), "BLOCK": BLOCK, "num_warps": 8}
        launch(kernel, self.map.programs, table.device, table, self.map.blocks, len(self.places), *args, **constants)


def parts_of(runs: Sequence[int] | None, *lists: Sequence[Tensor]) -> Iterator[Part]:
    """One part for each combination of dtypes: one, nearly always."""
    pieces = pieces_of([tensor.numel() for tensor in lists[0]], triples(runs))
    for uniform, kept, places in by_dtypes(pieces, *lists):
        kinds = [TYPES[tensors[0].dtype] for tensors in uniform]
        yield Part(block_map(kept, lists[0][0].device), [addresses(tensors) for tensors in uniform], kinds, places)


def form_number(taus: Tensor | None, form: str) -> int:
    """A form of shrinkage as kernels know it: 0 for none."""
    return 0 if taus is None else FORMS.index(form) + 1
