"""Batches: which tokens a step sees, as a pure function of (seed, step).

Nothing is remembered between steps, so a resumed run and every recipe of a comparison see the same batches.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spectrim.lab.tokens import TokenArray

__all__ = ["Batches", "validation_batches"]


class Batches:
    """The training batches of one seed.

    The tokens are cut into windows of ``sequence_length`` inputs and as many targets, one token on. An epoch visits
    every window once, in an order drawn from (seed, epoch); a batch may straddle two epochs.
    """

    def __init__(self, tokens: TokenArray, *, batch_size: int, sequence_length: int, seed: int) -> None:
        self.tokens = tokens
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.seed = seed
        self.windows = (len(tokens) - 1) // sequence_length
        # Two epochs: the one a batch is in and, where it straddles, the next.
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the batch with index ``step`` (from 0), each (batch_size, sequence_length), int64."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        windows = [self._order(int(position) // self.windows)[position % self.windows] for position in positions]
        return gather(self.tokens, windows, self.sequence_length)

    def _draw_order(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(self.windows)


def validation_batches(
    tokens: TokenArray, *, batches: int, batch_size: int, sequence_length: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The fixed validation set: windows spread evenly over the validation text, as many as asked for or exist."""
    available = (len(tokens) - 1) // sequence_length
    count = min(batches * batch_size, available)
    windows = [index * available // count for index in range(count)]
    for start in range(0, count, batch_size):
        yield gather(tokens, windows[start : start + batch_size], sequence_length)


def gather(tokens: TokenArray, windows: list[int], length: int) -> tuple[Tensor, Tensor]:
    rows = np.stack([tokens[window * length : (window + 1) * length + 1] for window in windows])
    batch = torch.from_numpy(rows.astype(np.int64))
    return batch[:, :-1], batch[:, 1:]
