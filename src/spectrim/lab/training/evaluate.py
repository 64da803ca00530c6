"""Validation loss, over all tokens and by how frequent a token is in the training text.

Tokens are ranked by frequency and cut into buckets that hold about equal shares of the training text: the first holds a
few words such as "the", the last thousands of rare ones. A bucket's name is its range of ranks, and every bucket has
about the same weight in the overall loss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from spectrim.lab.data.streams import TokenArray
from spectrim.lab.errors import LabError
from spectrim.lab.training.objective import next_token_logits
from spectrim.lab.training.processes import ONE_PROCESS, Parallel

__all__ = ["BUCKETS", "Evaluation", "FrequencyBuckets", "evaluate", "evaluation_steps", "frequency_buckets"]

BUCKETS = 4
"""Number of buckets; each holds about a quarter of the training text."""

CHUNK = 1 << 24
"""Tokens to count at a time; the text may be larger than memory."""


@dataclass(frozen=True)
class FrequencyBuckets:
    """The bucket of every token of the vocabulary."""

    names: tuple[str, ...]
    """Ranges of ranks such as "1-12", from the most frequent tokens to the rarest."""
    of_token: Tensor
    """(vocabulary,), int64: the bucket's index."""

    def to(self, device: torch.device) -> "FrequencyBuckets":
        """The same buckets with their tensor on a device."""
        return replace(self, of_token=self.of_token.to(device))


@dataclass(frozen=True)
class Evaluation:
    """Mean losses per token."""

    loss: float
    by_frequency: dict[str, float | None]
    """The mean loss of every bucket; None for a bucket without tokens in the validation set."""


def frequency_buckets(texts: Sequence[TokenArray], vocabulary_size: int) -> FrequencyBuckets:
    """Rank tokens by their count in the training text and cut the ranks at each quarter of it.

    If one token makes up more than a quarter, there are fewer buckets. Tokens that are not in the text come last.

    Raises:
        LabError: a token is not in the vocabulary.
    """
    counts = np.zeros(vocabulary_size, dtype=np.int64)
    for tokens in texts:
        for start in range(0, len(tokens), CHUNK):
            found = np.bincount(tokens[start : start + CHUNK], minlength=vocabulary_size)
            if len(found) > vocabulary_size:
                raise LabError(
                    f"the data holds token {len(found) - 1}, but the vocabulary has {vocabulary_size} tokens"
                )
            counts += found
    order = np.argsort(-counts, kind="stable")
    ranked = counts[order]
    # A token belongs to the quarter of the text in which its own share begins.
    begins = np.cumsum(ranked) - ranked
    quarters = np.minimum(BUCKETS * begins // max(1, sum(map(len, texts))), BUCKETS - 1)
    _, firsts, buckets = np.unique(quarters, return_index=True, return_inverse=True)
    lasts = [*firsts[1:], vocabulary_size]
    of_token = torch.empty(vocabulary_size, dtype=torch.int64)
    of_token[torch.from_numpy(order)] = torch.from_numpy(buckets)
    return FrequencyBuckets(tuple(f"{first + 1}-{last}" for first, last in zip(firsts, lasts, strict=True)), of_token)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    buckets: FrequencyBuckets,
    *,
    device: torch.device,
    precision: str,
    parallel: Parallel = ONE_PROCESS,
) -> Evaluation:
    """Mean loss per token over the fixed validation batches, overall and by bucket; each rank takes its rows of a
    batch."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    sums = torch.zeros(len(buckets.names), dtype=torch.float64, device=device)
    counts = torch.zeros_like(sums)
    of_token = buckets.of_token.to(device)
    model.eval()
    for all_inputs, all_targets in batches:
        inputs, targets = parallel.rows(all_inputs), parallel.rows(all_targets)
        if not len(inputs):
            # With fewer rows than ranks, this rank only takes part in collective operations.
            next_token_logits(model, all_inputs[:1].to(device), precision)
            continue
        target = targets.to(device).flatten()
        log_probabilities = functional.log_softmax(next_token_logits(model, inputs.to(device), precision), dim=-1)
        total += functional.nll_loss(log_probabilities, target).double() * target.numel()
        losses = functional.nll_loss(log_probabilities, target, reduction="none").double()
        sums.index_add_(0, of_token[target], losses)
        counts.index_add_(0, of_token[target], torch.ones_like(losses))
    model.train()
    if parallel.ranks > 1:
        from spectrim.lab.training.placement import reshard

        reshard(model)
    total, sums, counts = (parallel.add_up(each) for each in (total, sums, counts))
    means = zip(buckets.names, sums.tolist(), counts.tolist(), strict=True)
    return Evaluation(
        loss=float(total) / sum(targets.numel() for _, targets in batches),
        by_frequency={name: loss / count if count else None for name, loss, count in means},
    )


def evaluation_steps(steps: int, times: int) -> frozenset[int]:
    """The steps (from 1) after which to evaluate, evenly spaced; the last one is at the end."""
    return frozenset(math.ceil(index * steps / times) for index in range(1, times + 1))
