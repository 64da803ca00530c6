from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spectrim.lab.training.evaluate import evaluate, frequency_buckets


class Lookup(nn.Module):
    """Logits of the next token from this one alone."""

    def __init__(self, vocabulary_size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(
            torch.randn(vocabulary_size, vocabulary_size, generator=torch.Generator().manual_seed(0))
        )

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def text(counts: dict[int, int]) -> np.ndarray:
    return np.concatenate([np.full(count, token, dtype=np.uint16) for token, count in counts.items()])


def test_buckets_hold_quarters_of_the_text_from_frequent_to_rare() -> None:
    # Of 24 tokens every quarter has 6. By rank: 5 | 0, 3 | 6, 1, 2 | 4, 8, 7, and 9 and 10, which the text does not
    # hold; equal counts are in the order of their numbers, and 2 begins in the third quarter and ends in the last.
    buckets = frequency_buckets([text({5: 6, 3: 3, 0: 3, 1: 2}), text({2: 2, 4: 2, 6: 3, 7: 1, 8: 2})], 11)
    assert buckets.names == ("1-1", "2-3", "4-6", "7-11")
    assert buckets.of_token.tolist() == [1, 2, 2, 1, 3, 0, 2, 3, 3, 3, 3]


def test_a_token_of_more_than_half_the_text_leaves_no_empty_bucket() -> None:
    assert frequency_buckets([text({0: 60, 1: 10, 2: 20, 3: 10})], 4).names == ("1-1", "2-2", "3-4")


def test_losses_by_bucket_are_means_of_the_losses_by_token() -> None:
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 20, (4, 9), generator=draw).clamp(max=16)
    batches = [(tokens[:2, :-1], tokens[:2, 1:]), (tokens[2:, :-1], tokens[2:, 1:])]
    model = Lookup(20)
    buckets = frequency_buckets([np.repeat(np.arange(20, dtype=np.uint16), np.arange(20))], 20)
    result = evaluate(model, batches, buckets, device=torch.device("cpu"), precision="float32")

    losses: dict[str, list[float]] = {name: [] for name in buckets.names}
    log_probabilities = model.table.detach().double().log_softmax(-1)
    for before, target in zip(tokens[:, :-1].flatten().tolist(), tokens[:, 1:].flatten().tolist(), strict=True):
        losses[buckets.names[int(buckets.of_token[target])]].append(-float(log_probabilities[before, target]))
    everything = [loss for group in losses.values() for loss in group]
    assert result.loss == pytest.approx(sum(everything) / len(everything), rel=1e-5)
    for name, group in losses.items():
        assert result.by_frequency[name] == (pytest.approx(sum(group) / len(group), rel=1e-5) if group else None)
    assert result.by_frequency["1-3"] is None  # tokens 17, 18 and 19, which were clamped away
    assert model.training
