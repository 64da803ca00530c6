"""Spike and tail of planted gradients, against closed forms and against Adam's own arithmetic."""

import math

import pytest
import torch

from planted import basis, gaussian, low_rank
from spectrim.monitor.gradient_stacks import decompose
from spectrim.monitor.spike_tail import direction_noise, rank_edges, second_moment, spike_energy

M, N, BATCHES = 24, 40, 32
U, V = basis(M, M, seed=1), basis(N, M, seed=2)


def test_energy_shares_are_those_of_the_singular_values() -> None:
    values = torch.tensor([[3.0, 2.0, 1.0], [1.0, 4.0, 1.0]])
    assert spike_energy(values, 1) == pytest.approx((9 + 16) / (14 + 18))
    assert math.isnan(spike_energy(torch.zeros(3), 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decompositions_agree_with_the_singular_value_decomposition(dtype: torch.dtype) -> None:
    stack = gaussian(4, M, N, seed=0).to(dtype)
    values, left = decompose(stack)
    torch.testing.assert_close(values, torch.linalg.svdvals(stack.double()), rtol=1e-6, atol=1e-6)
    assert left.dtype == dtype
    rebuilt = left @ (left.mT @ stack)
    torch.testing.assert_close(rebuilt, stack, rtol=1e-4, atol=1e-4)


def test_directions_vary_as_planted_and_smaller_ones_relatively_more() -> None:
    signal = [8.0, 4.0, 2.0, 1.0]
    factors = 1 + 0.5 * gaussian(400, 4, seed=3) * torch.tensor([0.2, 0.4, 0.8, 1.6])
    stack = torch.einsum("bk,mk,nk->bmn", factors * torch.tensor(signal), U[:, :4], V[:, :4])
    found = direction_noise(stack, [1, 2, 3, 4])
    for group, ratio in zip(found, (0.1, 0.2, 0.4, 0.8), strict=True):
        assert group.relative == pytest.approx(ratio**2, rel=0.25)
    assert [group.mean_square for group in found] == pytest.approx([64, 16, 4, 1], rel=0.15)


def test_of_pure_noise_no_direction_is_said_to_have_a_mean() -> None:
    # On the batches that they come from, the leading directions of pure noise have a mean of many standard errors.
    lost = [group.relative is None for seed in range(10) for group in direction_noise(gaussian(16, M, N, seed=seed))]
    assert sum(lost) >= 0.85 * len(lost)
    group = next(g for g in direction_noise(gaussian(16, M, N, seed=0)) if g.relative is None)
    assert group.at_least is not None
    assert group.at_least > 2


def test_groups_of_ranks_double_and_cover_every_rank_once() -> None:
    assert rank_edges(24) == [1, 2, 4, 8, 16, 24]
    assert rank_edges(16) == [1, 2, 4, 8, 16]
    assert rank_edges(1) == [1]
    groups = direction_noise(gaussian(8, M, N, seed=0))
    assert [rank for group in groups for rank in range(group.first, group.last + 1)] == list(range(1, M + 1))


def test_the_second_moment_of_a_spike_that_sits_in_one_entry_is_its_alone() -> None:
    # Spike and tail do not share an entry: the tail's update is what it would be, and the median entry has no spike.
    stack = torch.zeros(8, 10, 12, dtype=torch.float64)
    stack[:, 0, 0] = 5.0
    stack[:, 1:, 1:] = 0.1 * gaussian(8, 9, 11, seed=1)
    found = second_moment(stack, 1)
    tail = float(stack[:, 1:, 1:].square().sum())
    assert found.share == pytest.approx(200 / (200 + tail))
    assert found.median_share == pytest.approx(0, abs=1e-12)
    assert found.contraction == pytest.approx(math.sqrt(99 / 100))


def test_a_dense_spike_contracts_the_tail_as_adams_division_does() -> None:
    signs = torch.sign(gaussian(M, 1, seed=2)) @ torch.sign(gaussian(1, N, seed=3))
    stack = 3.0 * signs + gaussian(200, M, N, seed=4)
    found = second_moment(stack, 1)
    spike = stack - low_rank_removed(stack)
    tail = stack - spike
    # Adam's division, without its running mean: RMS of T/√E[g²] against that of T/√E[T²].
    ours = (tail.square().mean(0) / stack.square().mean(0)).mean().sqrt()
    assert found.contraction == pytest.approx(float(ours), rel=1e-6)
    assert found.contraction == pytest.approx(math.sqrt(1 / 10), rel=0.1)
    assert found.median_share == pytest.approx(0.9, abs=0.02)


def low_rank_removed(stack: torch.Tensor) -> torch.Tensor:
    left, values, right = torch.linalg.svd(stack, full_matrices=False)
    values[..., 0] = 0
    return left * values[..., None, :] @ right


def test_tall_matrices_give_what_their_transposes_give() -> None:
    stack = low_rank(U, V, [4.0, 2.0]) + 0.3 * gaussian(8, M, N, seed=5)
    assert second_moment(stack.mT, 2).contraction == pytest.approx(second_moment(stack, 2).contraction, rel=1e-9)
    assert direction_noise(stack.mT)[0].variance == pytest.approx(direction_noise(stack)[0].variance, rel=1e-9)
