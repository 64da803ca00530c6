"""Screening over lists, and what becomes of the step, in both forms."""

import math

import pytest
import torch

from spectrim.kernels.device import screen
from spectrim.kernels.magnitudes import largest_magnitudes, magnitudes_and_roots, mean_roots
from spectrim.kernels.settling import settle

EAGER = {"test_every_gradient_needs_its_count"}
MIXED = [torch.float32, torch.bfloat16, torch.float16] * 3


def test_the_largest_magnitude_of_every_tensor_comes_through_exactly(form, lists):
    tensors = [tensor.to(dtype) for tensor, dtype in zip(lists(), MIXED, strict=False)]
    expected = [tensor.abs().max().item() if tensor.numel() else 0.0 for tensor in tensors]
    found = largest_magnitudes(tensors)
    assert found.dtype == torch.float32
    assert found.tolist() == expected
    assert largest_magnitudes([torch.empty(0), torch.empty(3, 0)]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [0, 4095, 4096, 5000])
def test_what_is_not_finite_comes_through_wherever_it_is(form, dtype, place):
    tensors = [torch.ones(5001, dtype=dtype) for _ in range(4)]
    tensors[1][place], tensors[2][place], tensors[3][place] = math.nan, -math.inf, math.nan
    tensors[3][7] = math.inf
    found = largest_magnitudes(tensors)
    assert found[0] == 1
    assert found[1].isnan()
    assert found[2] == math.inf
    assert found[3].isnan()


def test_the_largest_and_smallest_numbers_are_finite_and_not_zero(form):
    tensors = [torch.tensor([-3.4028234663852886e38]), torch.tensor([1e-45]), torch.tensor([-0.0])]
    assert largest_magnitudes(tensors).tolist() == [3.4028234663852886e38, 1.401298464324817e-45, 0.0]


def test_mean_roots_are_those_of_float64_for_every_matrix(form, lists):
    tensors = [tensor.to(dtype) for tensor, dtype in zip(lists(), MIXED, strict=False)]
    runs = [(6, 80, 40), (4, 0, 4097), (6, 0, 80), (5, 96, 4000), (0, 0, 0)]
    wanted = [tensors[i].double().view(-1)[a : a + n].abs().sqrt().sum() / max(1, n) for i, a, n in runs]
    torch.testing.assert_close(mean_roots(tensors, runs=runs).double(), torch.stack(wanted), rtol=1e-6, atol=0)
    whole = [t.double().abs().sqrt().sum() / max(1, t.numel()) for t in tensors]
    torch.testing.assert_close(mean_roots(tensors).double(), torch.stack(whole), rtol=1e-6, atol=0)
    assert mean_roots(tensors, runs=[]).tolist() == []
    counts = [10, 20, 30, 40, 50]
    shares = [w * max(1, n) / c for w, (_, _, n), c in zip(wanted, runs, counts, strict=True)]
    found = mean_roots(tensors, runs=runs, counts=counts)
    torch.testing.assert_close(found.double(), torch.stack(shares), rtol=1e-6, atol=0)


def test_one_reading_gives_both_and_the_same_to_the_bit(form, lists):
    tensors, runs = lists(), [(6, 0, 80), (3, 5, 1000)]
    magnitudes, roots = magnitudes_and_roots(tensors, runs=runs)
    assert torch.equal(magnitudes, largest_magnitudes(tensors))
    assert torch.equal(roots, mean_roots(tensors, runs=runs))


def test_a_matrix_of_many_blocks_is_added_in_order(form, monkeypatch):
    monkeypatch.setattr(screen, "CHUNK", 4)
    tensors = [torch.rand(4096 * 17 + 5), torch.rand(4096 * 4)]
    found = [mean_roots(tensors) for _ in range(2)]
    assert torch.equal(found[0], found[1])
    wanted = torch.stack([tensor.double().sqrt().mean() for tensor in tensors])
    torch.testing.assert_close(found[0].double(), wanted, rtol=1e-6, atol=0)


def test_entries_beyond_those_that_32_bits_count_are_reached(form, tmp_path):
    # A file of 4 GiB of which only the end is ever touched, and takes room.
    size = 2**31 + 300
    tensor = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.bfloat16)
    tensor[2**31 + 100 : 2**31 + 200] = 4.0
    assert mean_roots([tensor], runs=[(0, 2**31 + 100, 200)]).tolist() == [1.0]


@pytest.mark.parametrize("count", [1, 7, 1500])
@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("bad", [None, math.nan, math.inf, 1.01e19])
def test_a_step_is_counted_or_skipped_as_a_whole(form, count, integers, bad):
    magnitudes = torch.rand(count)
    magnitudes[-1] = 0.99e19  # whose square, summed over steps, is finite
    steps = list(torch.arange(float(count + 3)).unbind())
    skipped = list(torch.arange(count, dtype=torch.int32 if integers else torch.float32).unbind())
    if bad is not None:
        magnitudes[count // 2] = bad
    found = settle(magnitudes, steps, skipped)
    assert found.dtype == torch.float32
    assert found.shape == ()
    assert found.item() == (0.0 if bad is None else 1.0)
    assert [t.item() for t in steps] == [t + (bad is None) for t in range(count + 3)]
    assert [t.item() for t in skipped] == [t + (bad is not None and t == count // 2) for t in range(count)]


@pytest.mark.parametrize("other", [torch.tensor(3.0), torch.tensor([1.0])])
def test_others_can_have_a_step_skipped_without_blame(form, other):
    steps, skipped = list(torch.zeros(3).unbind()), list(torch.zeros(3).unbind())
    assert settle(torch.ones(3), steps, skipped, other).item() == 1.0
    assert settle(torch.ones(3), steps, skipped, other * 0).item() == 0.0
    assert settle(torch.ones(3), steps, [], other * math.nan).item() == 1.0
    assert [t.item() for t in steps] == [1.0] * 3
    assert [t.item() for t in skipped] == [0.0] * 3


def test_every_gradient_needs_its_count(form):
    with pytest.raises(ValueError, match="2 counts of skipped steps for 3"):
        settle(torch.ones(3), [], list(torch.zeros(2).unbind()))
    with pytest.raises(ValueError, match="1 counts for 3 matrices"):
        mean_roots([torch.ones(2)] * 3, counts=[2])
