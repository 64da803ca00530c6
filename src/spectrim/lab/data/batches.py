"""The batch of every step, as a pure function of (seed, step).

Nothing is remembered between steps, so a resumed run and every recipe of a comparison see the same batches. Weighted
streams are mixed in blocks of :data:`BLOCK` windows: every stream has its exact share of each block, in an order drawn
from (seed, block).
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spectrim.lab.data.streams import TokenStream

__all__ = ["BLOCK", "Batches", "shares", "validation_batches"]

BLOCK = 1000
"""Windows in a block, in which every stream has its exact share; weights are rounded to thousandths of their sum."""

Window = tuple[int, int]
"""The index of a stream, and of a window in it."""


class Batches:
    """The training batches of one seed.

    The tokens are cut into windows of ``sequence_length`` inputs and as many targets, one token on. An epoch of a
    stream visits each of its windows once, in an order drawn from (seed, epoch); a batch may reach into the next epoch.

    Where several processes share a batch, ``part`` is (which, of how many): equal parts of its rows, in their order.

    A share ``corrupted`` of the batches, drawn from (seed, step), has random tokens of the vocabulary in place of text.
    """

    def __init__(
        self,
        streams: Sequence[TokenStream],
        *,
        batch_size: int,
        sequence_length: int,
        seed: int,
        part: tuple[int, int] = (0, 1),
        corrupted: float = 0.0,
        vocabulary_size: int | None = None,
    ) -> None:
        self.streams = tuple(streams)
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.seed = seed
        self.rows = batch_size // part[1]
        self.first_row = part[0] * self.rows
        if corrupted and vocabulary_size is None:
            raise ValueError(f"corrupted={corrupted} needs vocabulary_size, got None")
        self.corrupted = corrupted
        self.vocabulary_size = vocabulary_size or 0
        self.windows = [stream.windows(sequence_length) for stream in self.streams]
        self.shares = shares([stream.weight for stream in self.streams])
        # A batch lies in at most two epochs of a stream, and in at most two blocks.
        self._order = lru_cache(maxsize=2 * len(self.streams))(self._draw_order)
        self._block = lru_cache(maxsize=2)(self._draw_block)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the batch with index ``step`` (from 0), each (rows, sequence_length), int64."""
        if self.corrupted and (noise := self._noise(step)) is not None:
            return noise
        first = step * self.batch_size + self.first_row
        positions = range(first, first + self.rows)
        return gather(self.streams, [self._window(position) for position in positions], self.sequence_length)

    def _noise(self, step: int) -> tuple[Tensor, Tensor] | None:
        """A batch of random tokens if that of this step is corrupted."""
        drawn = np.random.default_rng([self.seed, step, 0, 0])
        if drawn.random() >= self.corrupted:
            return None
        rows = drawn.integers(self.vocabulary_size, size=(self.batch_size, self.sequence_length + 1))
        batch = torch.from_numpy(rows[self.first_row : self.first_row + self.rows])
        return batch[:, :-1], batch[:, 1:]

    def _window(self, position: int) -> Window:
        stream, ordinal = 0, position
        if len(self.streams) > 1:
            block, offset = divmod(position, BLOCK)
            streams, ranks = self._block(block)
            stream = int(streams[offset])
            ordinal = block * self.shares[stream] + int(ranks[offset])
        epoch, index = divmod(ordinal, self.windows[stream])
        return stream, int(self._order(stream, epoch)[index])

    def _draw_order(self, stream: int, epoch: int) -> npt.NDArray[np.int64]:
        # A stream number of zero leaves the seed as it is, so the first stream has the order that it would have alone.
        return np.random.default_rng([self.seed, epoch, stream]).permutation(self.windows[stream])

    def _draw_block(self, block: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The stream of every window of a block, and how many of that stream come before it in the block."""
        drawn = np.random.default_rng([self.seed, block, len(self.streams)])
        streams = drawn.permutation(np.repeat(np.arange(len(self.streams)), self.shares))
        ranks = np.empty_like(streams)
        for stream, share in enumerate(self.shares):
            ranks[streams == stream] = np.arange(share)
        return streams, ranks


def shares(weights: Sequence[float]) -> list[int]:
    """The number of windows of a block for each weight; they add up to :data:`BLOCK`."""
    exact = [BLOCK * weight / sum(weights) for weight in weights]
    whole = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda index: whole[index] - exact[index])
    for index in by_remainder[: BLOCK - sum(whole)]:
        whole[index] += 1
    return whole


def validation_batches(
    streams: Sequence[TokenStream], *, batches: int, batch_size: int, sequence_length: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The fixed validation set: windows spread evenly over each stream's text, as many as asked for or exist.

    Every stream has its share of them, at least one.
    """
    windows: list[Window] = []
    for index, share in enumerate(shares([stream.weight for stream in streams])):
        available = streams[index].windows(sequence_length)
        count = min(max(1, round(batches * batch_size * share / BLOCK)), available)
        windows += [(index, window * available // count) for window in range(count)]
    for start in range(0, len(windows), batch_size):
        yield gather(streams, windows[start : start + batch_size], sequence_length)


def gather(streams: Sequence[TokenStream], windows: Sequence[Window], length: int) -> tuple[Tensor, Tensor]:
    rows = np.stack([streams[stream].window(window, length).astype(np.int64) for stream, window in windows])
    batch = torch.from_numpy(rows)
    return batch[:, :-1], batch[:, 1:]
