"""Routes: one rank's part of an all-to-all, planned once and reused in every step.

A route has the numbers of entries to and from every rank, and the copies that pack and unpack messages. It depends on
shapes and layouts, not on tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectrim.distributed.copies import Copy, copy_all, is_plain, merged

__all__ = ["Route", "RoutePlanner"]


@dataclass(frozen=True, eq=False)
class Route:
    """The messages that this rank sends and receives, and the copies that it makes.

    Attributes:
        sent, received: numbers of entries to and from every rank of the process group.
        packing: (index of a tensor, copy from it to the message).
        unpacking: (index of a target, copy from the received message to it).
        keeping: (index of a tensor, index of a target, copy between them) on this rank.
        is_concatenation: the message consists of consecutive contiguous parts of tensors.
    """

    sent: list[int]
    received: list[int]
    packing: tuple[tuple[int, Copy], ...]
    unpacking: tuple[tuple[int, Copy], ...]
    keeping: tuple[tuple[int, int, Copy], ...]
    is_concatenation: bool

    @property
    def total_sent(self) -> int:
        """The number of entries that this rank sends."""
        return sum(self.sent)

    def pack(self, tensors: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Pack contiguous tensors of this dtype into the message."""
        if self.is_concatenation and self.packing:
            return torch.cat(
                [tensors[slot].view(-1)[copy.source : copy.source + _size(copy)] for slot, copy in self.packing]
            )
        message = torch.empty(self.total_sent, dtype=dtype, device=device)
        copy_all([(tensors[slot], message, copy) for slot, copy in self.packing])
        return message

    def unpack(self, message: Tensor, own: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Fill contiguous targets from the received message and from this rank's own tensors."""
        arrived = [(message, targets[slot], copy) for slot, copy in self.unpacking]
        copy_all(arrived + [(own[slot], targets[target], copy) for slot, target, copy in self.keeping])


class RoutePlanner:
    """Builds a route from parcels. For every pair of ranks, both must add their parcels in the same order.

    Args:
        order: for every member its rank in the process group.
    """

    def __init__(self, order: Sequence[int]) -> None:
        self._order = order
        self._out: dict[int, list[tuple[int, Sequence[Copy]]]] = {}
        self._in: dict[int, list[tuple[int, Sequence[Copy]]]] = {}
        self._kept: dict[tuple[int, int], list[Copy]] = {}

    def send(self, receiver: int, slot: int, copies: Sequence[Copy]) -> None:
        """Add a parcel for another member: copies from a tensor that fill a contiguous parcel."""
        self._out.setdefault(receiver, []).append((slot, copies))

    def receive(self, sender: int, slot: int, copies: Sequence[Copy]) -> None:
        """Add a parcel from another member: copies from a contiguous parcel to a tensor."""
        self._in.setdefault(sender, []).append((slot, copies))

    def keep(self, slot: int, target: int, copies: Sequence[Copy]) -> None:
        """Add copies between tensors of this rank."""
        self._kept.setdefault((slot, target), []).extend(copies)

    def route(self) -> Route:
        """The route of all parcels."""
        sent, packing = self._laid_out(self._out, incoming=False)
        received, unpacking = self._laid_out(self._in, incoming=True)
        packing.sort(key=lambda item: item[1].target)
        end, in_turn = 0, True
        for _, copy in packing:
            in_turn = in_turn and copy.target == end and is_plain(copy)
            end += _size(copy)
        keeping = [(*slots, copy) for slots, copies in self._kept.items() for copy in merged(copies)]
        return Route(sent, received, tuple(packing), tuple(unpacking), tuple(keeping), in_turn)

    def _laid_out(
        self, parcels: dict[int, list[tuple[int, Sequence[Copy]]]], *, incoming: bool
    ) -> tuple[list[int], list[tuple[int, Copy]]]:
        """The number of entries for every rank, and every tensor's copies from or to the message, in order of ranks."""
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
    return math.prod(copy.shape)
