from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrim.lab.data.batches import BLOCK, Batches, shares, validation_batches
from spectrim.lab.data.streams import ArrayWriter, TokenStream
from spectrim.lab.errors import LabError


def stream(length: int, start: int = 0, weight: float = 1.0) -> TokenStream:
    return TokenStream([np.arange(start, start + length, dtype=np.uint32)], weight=weight)


def windows_of(batches: Batches, steps: range) -> list[int]:
    """The first token of every sequence; with tokens 0, 1, 2, … that is where it starts."""
    return [int(start) for step in steps for start in batches(step)[0][:, 0]]


@pytest.mark.parametrize("streams", [[stream(1000)], [stream(500, weight=0.3), stream(700, 10_000, weight=0.7)]])
def test_a_batch_is_a_pure_function_of_seed_and_step(streams: list[TokenStream]) -> None:
    settings = {"batch_size": 4, "sequence_length": 10}
    forwards, backwards = Batches(streams, seed=1, **settings), Batches(streams, seed=1, **settings)
    steps = [*range(60), 249, 250, 251, 10_000]
    first = {step: forwards(step) for step in steps}
    for step in reversed(steps):
        assert torch.equal(backwards(step)[0], first[step][0])
    other = Batches(streams, seed=2, **settings)
    assert any(not torch.equal(other(step)[0], first[step][0]) for step in range(3))
    inputs, targets = first[0]
    assert torch.equal(inputs + 1, targets)


def test_a_share_of_batches_is_random_tokens_and_the_others_are_as_without_it() -> None:
    shape = {"batch_size": 6, "sequence_length": 10, "seed": 3}
    text = stream(300_000)
    plain, noisy = Batches([text], **shape), Batches([text], corrupted=0.1, vocabulary_size=50, **shape)
    halves = [Batches([text], corrupted=0.1, vocabulary_size=50, part=(part, 2), **shape) for part in (0, 1)]
    corrupted = 0
    for step in range(1000):
        inputs, targets = noisy(step)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert torch.equal(torch.cat([half(step)[0] for half in halves]), inputs)
        if not torch.equal(inputs, plain(step)[0]):
            corrupted += 1
            assert inputs.shape == (6, 10)
            assert inputs.unique().numel() > 20
            assert inputs.max() < 50
    assert 70 < corrupted < 130  # 100 expected, standard deviation 9.5
    with pytest.raises(ValueError, match=r"corrupted=0\.1 needs vocabulary_size"):
        Batches([text], corrupted=0.1, **shape)


def test_an_epoch_visits_every_window_once_and_epochs_differ() -> None:
    # 33 windows in batches of 4: batches straddle epochs.
    batches = Batches([stream(331)], seed=0, batch_size=4, sequence_length=10)
    starts = windows_of(batches, range(33))
    epochs = [starts[index : index + 33] for index in range(0, 132, 33)]
    for epoch in epochs:
        assert sorted(epoch) == [10 * window for window in range(33)]
    assert epochs[0] != epochs[1]


def test_windows_lie_in_one_array_each() -> None:
    arrays = [np.arange(25, dtype=np.uint16), np.arange(5, dtype=np.uint16), np.arange(100, 131, dtype=np.uint16)]
    parts = TokenStream(arrays)
    assert (len(parts), parts.windows(10)) == (61, 5)
    assert [parts.window(index, 10).tolist() for index in range(5)] == [
        list(range(start, start + 11)) for start in (0, 10, 100, 110, 120)
    ]


def test_a_mixture_has_its_exact_shares_in_every_block_and_visits_each_source_in_epochs() -> None:
    streams = [stream(331, weight=2.0), stream(2011, 100_000, weight=1.0), stream(5001, 200_000, weight=5.0)]
    batches = Batches(streams, seed=3, batch_size=8, sequence_length=10)
    starts = windows_of(batches, range(3 * BLOCK // 8))
    for block in range(3):
        counts = Counter(start // 100_000 for start in starts[block * BLOCK : (block + 1) * BLOCK])
        assert counts == {0: 250, 1: 125, 2: 625}
    # 33, 201 and 500 windows: each source goes through all of its own before any of them comes again.
    for index, count in enumerate((33, 201, 500)):
        own = [start - index * 100_000 for start in starts if start // 100_000 == index]
        for epoch in range(len(own) // count):
            assert sorted(own[epoch * count : (epoch + 1) * count]) == [10 * window for window in range(count)]


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8))
def test_shares_are_whole_and_the_nearest_to_the_weights(weights: list[float]) -> None:
    whole = shares(weights)
    assert sum(whole) == BLOCK
    assert all(abs(share - BLOCK * weight / sum(weights)) < 1 for share, weight in zip(whole, weights, strict=True))


def test_the_validation_set_spreads_over_the_text_and_takes_what_there_is() -> None:
    some = list(validation_batches([stream(1001)], batches=2, batch_size=5, sequence_length=10))
    assert [len(inputs) for inputs, _ in some] == [5, 5]
    assert [int(start) for inputs, _ in some for start in inputs[:, 0]] == list(range(0, 1000, 100))
    everything = list(validation_batches([stream(1001)], batches=50, batch_size=8, sequence_length=10))
    assert sum(len(inputs) for inputs, _ in everything) == 100


def test_the_validation_set_of_a_mixture_has_its_shares() -> None:
    streams = [stream(1001, weight=3.0), stream(301, 100_000, weight=1.0)]
    made = list(validation_batches(streams, batches=2, batch_size=10, sequence_length=10))
    starts = [int(start) for inputs, _ in made for start in inputs[:, 0]]
    assert starts == [*(10 * (window * 100 // 15) for window in range(15)), *(100_000 + 60 * w for w in range(5))]


def test_a_token_outside_the_vocabulary_is_named() -> None:
    bad = TokenStream([np.arange(1000, dtype=np.uint16)], vocabulary_size=900, name="'shards'")
    batches = Batches([bad], seed=0, batch_size=99, sequence_length=10)
    with pytest.raises(LabError, match=r"'shards' holds token 9\d\d, but its vocabulary_size is 900"):
        batches(0)


@pytest.mark.parametrize("counts", [[], [3, 0, 4], [12_345, 100_000]])
def test_tokens_written_piece_by_piece_are_a_numpy_file(tmp_path: Path, counts: list[int]) -> None:
    pieces = [np.arange(count) % 60_000 for count in counts]
    writer = ArrayWriter(tmp_path / "tokens.npy", np.uint16)
    for piece in pieces:
        writer.append(piece.tolist())
    writer.close()
    stored = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    assert stored.dtype == np.uint16
    assert stored.tolist() == [int(token) for piece in pieces for token in piece]
