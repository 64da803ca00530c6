"""Which block of a kernel works on what."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrim.kernels import table
from spectrim.kernels.table import BLOCK, block_map, by_dtypes, pieces_of, upload

CPU = torch.device("cpu")


@st.composite
def sizes_and_runs(draw):
    """Sizes of tensors, and runs in any order that do not overlap and may leave entries out."""
    sizes = draw(st.lists(st.integers(0, 3 * BLOCK), min_size=1, max_size=5))
    runs = []
    for index, size in enumerate(sizes):
        cuts = sorted(draw(st.sets(st.integers(0, size), max_size=4)))
        runs += [(index, a, b - a) for a, b in pairwise(cuts) if draw(st.booleans())]
    return sizes, draw(st.permutations(runs))


@given(sizes_and_runs())
def test_blocks_cover_every_entry_once_and_know_its_matrix(case):
    sizes, runs = case
    made = block_map(sizes, runs, CPU)
    owner = [torch.full((size,), -2) for size in sizes]
    for packed, begin, end in made.blocks.tolist():
        index, matrix = packed & 0xFFFFFFFF, packed >> 32
        part = owner[index][begin : min(begin + BLOCK, end)]
        assert (part == -2).all()
        part[:] = matrix
    for index, entries in enumerate(owner):
        expected = torch.full_like(entries, -1)
        for matrix, (of, start, length) in enumerate(runs):
            if of == index:
                expected[start : start + length] = matrix
        assert torch.equal(entries, expected)
    for matrix, (_, _, length) in enumerate(runs):
        first, count = made.spans[matrix].tolist()
        assert count == -(-length // BLOCK)
        assert all(packed >> 32 == matrix for packed in made.blocks[first : first + count, 0].tolist())


def test_offsets_beyond_32_bits_are_exact():
    size = 2**33 + 5
    made = block_map([3, size], None, CPU)
    assert made.blocks[-1].tolist() == [2**32 + 1, 2**33, size]
    assert made.programs == 1 + 2**33 // BLOCK + 1
    table._kept.clear()  # it is large


def test_maps_are_kept_by_sizes_and_no_more_than_some(monkeypatch):
    monkeypatch.setattr(table, "MOST_KEPT", 3)
    table._kept.clear()
    maps = [block_map([size], None, CPU) for size in range(1, 5)]
    assert len(table._kept) == 3
    assert block_map([4], None, CPU) is maps[3]
    assert block_map([1], None, CPU) is not maps[0]


def test_a_table_has_integers_then_numbers_and_is_uploaded_when_they_change():
    made = upload(CPU, [[1, 2**62], [-3, 4]], [[0.1, 1e-300]])
    assert made[:4].tolist() == [1, 2**62, -3, 4]
    assert made[4:].view(torch.float64).tolist() == [0.1, 1e-300]
    assert upload(CPU, [[1, 2**62], [-3, 4]], [[0.1, 1e-300]]) is made
    assert upload(CPU, [[1, 2**62], [-3, 4]], [[0.1, 2e-300]])[5:].view(torch.float64).tolist() == [2e-300]


def test_lists_are_taken_apart_by_their_dtypes():
    full, half = torch.ones(2), torch.ones(2).half()
    lists = ([full, half, full], [half, half, half])
    taken = list(by_dtypes(pieces_of([2, 2, 2], [(0, 0, 2), (2, 0, 2), (1, 0, 2)]), *lists))
    assert [places for _, _, places in taken] == [[0, 2], [1]]
    assert [[tuple(piece) for piece in pieces] for _, pieces, _ in taken] == [
        [(0, 0, 2, 0), (1, 0, 2, 1)],
        [(0, 0, 2, 2)],
    ]


@pytest.mark.parametrize(("start", "aligned"), [(0, True), (16, True), (8, False)])
def test_pieces_that_begin_off_16_bytes_are_known(start, aligned):
    made = block_map([100], [(0, 0, start), (0, start, 100 - start)], CPU)
    assert made.aligned is aligned
