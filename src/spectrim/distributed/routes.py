"""Routes: one rank's part of an all-to-all, planned once and travelled in every step.

A route knows how much goes to and comes from every rank, and by which copies this rank packs its message and unpacks
what arrives. It depends on shapes and layouts alone, never on tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectrim.distributed.copies import Copy, copy_all, is_plain, merged

__all__ = ["Route", "RoutePlanner"]


@dataclass(frozen=True, eq=False)
class Route:
    """What this rank sends, gets and keeps.

    Attributes:
        sent, received: how many entries go to, and come from, every rank of the process group; and in total.
        packing: which tensors are sent, and the copies from each to the message.
        unpacking: which tensors are filled, and the copies from what was received to each.
        keeping: of what this rank has and wants itself, which tensor, to which, and how.
        is_concatenation: the message is nothing but runs of the tensors' memory, one after another.
    """

    sent: list[int]
    received: list[int]
    total_sent: int
    total_received: int
    packing: tuple[tuple[int, Copy], ...]
    unpacking: tuple[tuple[int, Copy], ...]
    keeping: tuple[tuple[int, int, Copy], ...]
    is_concatenation: bool

    def pack(self, tensors: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The message: contiguous tensors of its dtype, in parts."""
        if self.is_concatenation and self.packing:
            return torch.cat(
                [tensors[slot].view(-1)[copy.source : copy.source + _size(copy)] for slot, copy in self.packing]
            )
        message = torch.empty(self.total_sent, dtype=dtype, device=device)
        copy_all([(tensors[slot], message, copy) for slot, copy in self.packing])
        return message

    def unpack(self, message: Tensor, own: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Fill contiguous tensors from what was received and from what this rank has itself."""
        arrived = [(message, targets[slot], copy) for slot, copy in self.unpacking]
        copy_all(arrived + [(own[slot], targets[target], copy) for slot, target, copy in self.keeping])


class RoutePlanner:
    """Gathers the parcels of a route. For every pair of ranks, both add their parcels in the same order.

    Args:
        order: for every member its rank in the process group.
        member: this one.
    """

    def __init__(self, order: Sequence[int], member: int) -> None:
        self._order, self._member = order, member
        self._out: dict[int, list[tuple[int, Sequence[Copy]]]] = {}
        self._in: dict[int, list[tuple[int, Sequence[Copy]]]] = {}
        self._kept: dict[tuple[int, int], list[Copy]] = {}

    def send(self, receiver: int, slot: int, copies: Sequence[Copy]) -> None:
        """Add a parcel to another member: copies of a tensor to a contiguous parcel, which they fill."""
        self._out.setdefault(receiver, []).append((slot, copies))

    def receive(self, sender: int, slot: int, copies: Sequence[Copy]) -> None:
        """Expect a parcel of another member: copies of a contiguous parcel to a tensor."""
        self._in.setdefault(sender, []).append((slot, copies))

    def keep(self, slot: int, target: int, copies: Sequence[Copy]) -> None:
        """Copy from a tensor to a tensor of this rank."""
        self._kept.setdefault((slot, target), []).extend(copies)

    def route(self) -> Route:
        """All parcels as a route."""
        sent, packing = self._laid_out(self._out, incoming=False)
        received, unpacking = self._laid_out(self._in, incoming=True)
        packing.sort(key=lambda item: item[1].target)
        end, in_turn = 0, True
        for _, copy in packing:
            in_turn = in_turn and copy.target == end and is_plain(copy)
            end += _size(copy)
        keeping = [(*slots, copy) for slots, copies in self._kept.items() for copy in merged(copies)]
        return Route(
            sent, received, sum(sent), sum(received), tuple(packing), tuple(unpacking), tuple(keeping), in_turn
        )

    def _laid_out(
        self, parcels: dict[int, list[tuple[int, Sequence[Copy]]]], *, incoming: bool
    ) -> tuple[list[int], list[tuple[int, Copy]]]:
        """Sizes by rank, and for every tensor its copies from or to the whole message, in the order of ranks."""
        sizes = [0] * len(self._order)
        by_slot: dict[int, list[Copy]] = {}
        offset = 0
        for member in sorted(parcels, key=self._order.__getitem__):
            begin = offset
            for slot, copies in parcels[member]:
                place = {"source": offset} if incoming else {"target": offset}
                by_slot.setdefault(slot, []).extend(copy.moved(**place) for copy in copies)
                offset += sum(map(_size, copies))
            sizes[self._order[member]] = offset - begin
        return sizes, [(slot, copy) for slot, copies in by_slot.items() for copy in merged(copies)]


def _size(copy: Copy) -> int:
    size = 1
    for length in copy.shape:
        size *= length
    return size
