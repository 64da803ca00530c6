"""What a kernel over lists of tensors is given: where the tensors are, their numbers, and which block works on what.

The table holds addresses and numbers; where it is not what it was before, it goes up in one copy from pinned memory,
without a wait. The block map depends on sizes alone. Both are kept on the device, and shared by calls of the same
content.

Under CUDA graph capture a copy is recorded with its address on the host, and replayed from there. What a captured graph
reads, host buffers and block maps, is therefore kept until the process ends: some kilobytes for each captured call.
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

#: What pieces must begin at for loads of 16 bytes, in entries.
ALIGNMENT = 16

#: Block maps and tables kept at a time, over all devices; a map has 24 bytes for 4,096 entries.
MOST_KEPT = 256

#: Bytes of pinned memory set aside for captured graphs when the first table goes up: pinning while capturing may fail.
RESERVE = 2**20


class Piece(NamedTuple):
    """A contiguous part of one tensor of a list, and the place of its logical matrix, −1 where it has none."""

    tensor: int
    start: int
    length: int
    matrix: int


class BlockMap(NamedTuple):
    """Which block works on what.

    blocks: (B, 3) int64: the matrix in the upper 32 bits, the tensor in the lower; the first entry; the piece's end.
    spans: (P, 2) int64: of every piece, its first block and its number of blocks.
    programs: B.
    aligned: whether every block begins where loads of 16 bytes may.
    """

    blocks: Tensor
    spans: Tensor
    programs: int
    aligned: bool


def pieces_of(sizes: Sequence[int], runs: Sequence[Run] | None) -> tuple[Piece, ...]:
    """The pieces of tensors of these sizes: the runs in their order, then all that no run has, without matrix."""
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
    """Lists whose dtypes are uniform, with their pieces and the places they had: one, nearly always."""
    if all(len({tensor.dtype for tensor in tensors}) == 1 for tensors in lists):
        yield [list(tensors) for tensors in lists], tuple(pieces), list(range(len(lists[0])))
        return
    kinds: dict[tuple[torch.dtype, ...], list[int]] = {}
    for index, together in enumerate(zip(*lists, strict=True)):
        kinds.setdefault(tuple(tensor.dtype for tensor in together), []).append(index)
    for places in kinds.values():
        new = {old: index for index, old in enumerate(places)}
        kept = tuple(piece._replace(tensor=new[piece.tensor]) for piece in pieces if piece.tensor in new)
        yield [[tensors[i] for i in places] for tensors in lists], kept, places


class _Kept(NamedTuple):
    """Something that was uploaded: the memory, where that was asked for, and when it was there."""

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
    """The block map of tensors of these sizes, as :func:`pieces_of` cuts them; from the cache where it is there.

    Args:
        whole: False leaves out what no run has.
    """
    key = (tuple(sizes), None if runs is None else tuple(runs), whole)

    def made() -> tuple[BlockMap, Tensor]:
        pieces = pieces_of(sizes, runs)
        return _map_of(pieces if whole or runs is None else pieces[: len(runs)], device)

    result: BlockMap = _uploaded(("map", *key), device, made)
    return result


def map_of_pieces(pieces: tuple[Piece, ...], device: torch.device) -> BlockMap:
    """The block map of some pieces, from the cache where it is there."""
    result: BlockMap = _uploaded(("pieces", pieces), device, lambda: _map_of(pieces, device))
    return result


def _map_of(pieces: Sequence[Piece], device: torch.device) -> tuple[BlockMap, Tensor]:
    blocks, spans = _made(pieces)
    moved = _to(torch.cat([blocks.view(-1), spans.view(-1)]), device)
    count = len(blocks)
    aligned = all(piece.start % ALIGNMENT == 0 for piece in pieces)
    return BlockMap(moved[: 3 * count].view(count, 3), moved[3 * count :].view(-1, 2), count, aligned), moved


def _uploaded(key: Hashable, device: torch.device, make: Callable[[], tuple[Any, Tensor]]) -> Any:
    """What ``make`` makes, with its memory; the same as before where it was made before and is still kept."""
    capturing = _capturing(device)
    key = (key, device)
    kept = _kept.get(key)
    if kept is not None:
        _kept.move_to_end(key)
        if not capturing:  # a capture begins with a synchronisation
            _order_after(kept, device)
    else:
        value, memory = make()
        stream = torch.cuda.current_stream(device) if device.type == "cuda" and not capturing else None
        kept = _Kept(
            value, memory, stream.stream_id if stream else 0, stream.record_event() if stream is not None else None
        )
        if capturing:
            # What was captured has not happened: until a replay there is nothing in this memory.
            return value
        _kept[key] = kept
        while len(_kept) > MOST_KEPT:
            _kept.popitem(last=False)
    if capturing:
        _captured.append(kept)
    return kept.value


def _order_after(kept: _Kept, device: torch.device) -> None:
    """Let the current stream wait, on the device, for an upload by another, and keep the memory from reuse."""
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
    """A table on a device: rows of integers, then rows of float64, as int64 each. It is not to be written to.

    A table of the same content as one before is not uploaded again: addresses stay what they were from step to step.

    Args:
        whole, numbers: rows of any lengths, laid one after the other; an address is an integer.
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
    """A copy on the device, by way of pinned memory.

    The ring of pinned buffers is torch's allocator of them: it gives a freed buffer again only once the events of the
    copies that read it have passed.
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
    """Pinned memory for a captured graph, never given back."""
    if not _reserve or len(_reserve[0]) < count:
        return torch.empty(count, dtype=torch.int64, pin_memory=True)
    taken = _reserve[0][:count]
    # To a multiple of eight words, so that copies stay aligned.
    _reserve[0] = _reserve[0][-(-count // 8) * 8 :]
    return taken


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
