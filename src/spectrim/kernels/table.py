"""Arguments of kernels over lists of tensors: a table of addresses and numbers, and a map from programs to entries.

A table is uploaded from pinned memory in one copy, without waiting, unless an equal one is on the device already. The
block map depends on sizes only. Both are cached on the device.

CUDA graph capture records a copy with its host address. The host buffers and block maps that a captured graph reads are
therefore kept until the process ends: some kilobytes for each captured call.
"""

from __future__ import annotations

import itertools
from array import array
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .runs import Run

__all__ = ["BLOCK", "BlockMap", "Piece", "block_map", "by_dtypes", "map_of_pieces", "pieces_of", "upload"]

#: Entries that one program of a kernel works on.
BLOCK = 4096

#: Loads of 16 bytes need pieces that begin at multiples of this many entries.
ALIGNMENT = 16

#: The most cached block maps and tables, over all devices; a map has 24 bytes for 4,096 entries.
MOST_KEPT = 256

#: Bytes of pinned memory that are reserved for captured graphs at the first upload, since pinning may fail in a
#: capture.
RESERVE = 2**20


class Piece(NamedTuple):
    """A contiguous part of one tensor of a list, and the index of its logical matrix, or −1."""

    tensor: int
    start: int
    length: int
    matrix: int


class BlockMap(NamedTuple):
    """The entries that each program of a kernel works on.

    Attributes:
        blocks: (B, 3) int64: matrix (upper 32 bits) and tensor (lower 32 bits); first entry; end of the piece.
        spans: (P, 2) int64: first block and number of blocks of every piece.
        programs: B.
        aligned: True if every block begins at a multiple of :data:`ALIGNMENT`.
    """

    blocks: Tensor
    spans: Tensor
    programs: int
    aligned: bool


def pieces_of(sizes: Sequence[int], runs: Sequence[Run] | None) -> tuple[Piece, ...]:
    """The pieces of tensors of these sizes: first the runs, then the entries outside of runs, which have no matrix."""
    if runs is None:
        return tuple(Piece(index, 0, size, index) for index, size in enumerate(sizes))
    pieces = [Piece(*run, number) for number, run in enumerate(runs)]
    ends = [0] * len(sizes)
    gaps = []
    for index, start, length in sorted(runs):
        if start > ends[index]:
            gaps.append(Piece(index, ends[index], start - ends[index], -1))
        ends[index] = start + length
    gaps += [Piece(index, end, sizes[index] - end, -1) for index, end in enumerate(ends) if end < sizes[index]]
    return tuple(pieces + gaps)


def by_dtypes(
    pieces: Sequence[Piece], *lists: Sequence[Tensor]
) -> Iterator[tuple[list[list[Tensor]], tuple[Piece, ...], list[int]]]:
    """Split lists by combination of dtypes; with their pieces and their indices."""
    kinds: dict[tuple[torch.dtype, ...], list[int]] = {}
    for index, together in enumerate(zip(*lists, strict=True)):
        kinds.setdefault(tuple(tensor.dtype for tensor in together), []).append(index)
    for places in kinds.values():
        new = {old: index for index, old in enumerate(places)}
        kept = tuple(piece._replace(tensor=new[piece.tensor]) for piece in pieces if piece.tensor in new)
        yield [[tensors[i] for i in places] for tensors in lists], kept, places


class _Kept(NamedTuple):
    """A cached upload: its memory, the stream that uploaded it, and the event after which it is complete."""

    value: Any
    memory: Tensor
    stream: int
    uploaded: torch.cuda.Event | None


_kept: OrderedDict[Hashable, _Kept] = OrderedDict()
_captured: list[object] = []
_reserve: list[Tensor] = []


def block_map(
    sizes: Sequence[int], runs: Sequence[Run] | None, device: torch.device, *, whole: bool = True
) -> BlockMap:
    """The block map of tensors of these sizes; cached.

    Args:
        whole: False leaves out entries outside of runs.
    """
    key = (tuple(sizes), None if runs is None else tuple(runs), whole)

    def made() -> tuple[BlockMap, Tensor]:
        pieces = pieces_of(sizes, runs)
        return _map_of(pieces if whole or runs is None else pieces[: len(runs)], device)

    result: BlockMap = _uploaded(("map", *key), device, made)
    return result


def map_of_pieces(pieces: tuple[Piece, ...], device: torch.device) -> BlockMap:
    """The block map of pieces; cached."""
    result: BlockMap = _uploaded(("pieces", pieces), device, lambda: _map_of(pieces, device))
    return result


def _map_of(pieces: Sequence[Piece], device: torch.device) -> tuple[BlockMap, Tensor]:
    blocks, spans = _made(pieces)
    moved = _to(torch.cat([blocks.view(-1), spans.view(-1)]), device)
    count = len(blocks)
    aligned = all(piece.start % ALIGNMENT == 0 for piece in pieces)
    return BlockMap(moved[: 3 * count].view(count, 3), moved[3 * count :].view(-1, 2), count, aligned), moved


def _uploaded(key: Hashable, device: torch.device, make: Callable[[], tuple[Any, Tensor]]) -> Any:
    """The value that ``make`` returns with its memory; cached by key and device."""
    capturing = _capturing(device)
    key = (key, device)
    kept = _kept.get(key)
    if kept is not None:
        _kept.move_to_end(key)
        if not capturing:  # a capture starts with a synchronisation
            _order_after(kept, device)
    else:
        value, memory = make()
        stream = torch.cuda.current_stream(device) if device.type == "cuda" and not capturing else None
        kept = _Kept(
            value, memory, stream.stream_id if stream else 0, stream.record_event() if stream is not None else None
        )
        if capturing:
            # Not cached: until the graph is replayed, this memory has no content.
            return value
        _kept[key] = kept
        while len(_kept) > MOST_KEPT:
            _kept.popitem(last=False)
    if capturing:
        _captured.append(kept)
    return kept.value


def _order_after(kept: _Kept, device: torch.device) -> None:
    """Make the current stream wait, on the device, for another stream's upload, and protect the memory from reuse."""
    if kept.uploaded is None:
        return
    stream = torch.cuda.current_stream(device)
    if stream.stream_id != kept.stream:
        stream.wait_event(kept.uploaded)
        kept.memory.record_stream(stream)


def _made(pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
    """:class:`BlockMap`'s blocks and spans, on the host."""
    table = torch.tensor([tuple(piece) for piece in pieces], dtype=torch.int64).view(-1, 4)
    tensor, start, length, matrix = table.unbind(1)
    counts = (length + BLOCK - 1) // BLOCK
    firsts = counts.cumsum(0) - counts
    owner = torch.repeat_interleave(torch.arange(len(table)), counts)
    begin = start[owner] + (torch.arange(len(owner)) - firsts[owner]) * BLOCK
    packed = matrix[owner] * 2**32 + tensor[owner]
    blocks = torch.stack([packed, begin, (start + length)[owner]], dim=1)
    return blocks, torch.stack([firsts, counts], dim=1)


def upload(device: torch.device, whole: Sequence[Sequence[int]], numbers: Sequence[Sequence[float]] = ()) -> Tensor:
    """A table on a device: rows of integers, then rows of float64, all as int64. It must not be written to.

    A table with the same content as before is not uploaded again; addresses usually do not change between steps.

    Args:
        whole, numbers: rows of any lengths, which are concatenated. Addresses are integers.
    """
    content = array("q", itertools.chain.from_iterable(whole)).tobytes()
    content += array("d", itertools.chain.from_iterable(numbers)).tobytes()
    if not content:
        return torch.empty(0, dtype=torch.int64, device=device)

    def made() -> tuple[Tensor, Tensor]:
        moved = _to(torch.frombuffer(bytearray(content), dtype=torch.int64), device)
        return moved, moved

    result: Tensor = _uploaded(content, device, made)
    return result


def _to(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, through pinned memory.

    torch's allocator of pinned memory reuses a freed buffer only after the copies from it are complete.
    """
    if device.type == "cpu":
        return host.clone()
    if _capturing(device):
        pinned = _from_reserve(host.numel())
        _captured.append(pinned)
    else:
        if not _reserve:
            _reserve.append(torch.empty(RESERVE // 8, dtype=torch.int64, pin_memory=True))
        pinned = torch.empty(host.shape, dtype=host.dtype, pin_memory=True)
    pinned.copy_(host)
    return pinned.to(device, non_blocking=True)


def _from_reserve(count: int) -> Tensor:
    """Pinned memory for a captured graph, which is never freed."""
    if not _reserve or len(_reserve[0]) < count:
        return torch.empty(count, dtype=torch.int64, pin_memory=True)
    taken = _reserve[0][:count]
    # A multiple of eight words, so that copies stay aligned.
    _reserve[0] = _reserve[0][-(-count // 8) * 8 :]
    return taken


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
