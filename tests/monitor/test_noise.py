"""Mean and noise of planted gradients: estimates against what was put in."""

import math

import pytest
import torch

from planted import basis, gaussian, low_rank
from spectrim.monitor.noise import energies, gaussian_localisation, noise_structure, overlap

M, N, BATCHES = 24, 40, 32
U, V = basis(M, 6, seed=1), basis(N, 6, seed=2)
SIGNAL = low_rank(U, V, [3.0, 2.0])


def test_energies_are_those_that_were_planted_within_their_errors() -> None:
    signals, errors = [], []
    for seed in range(40):
        signal, noise = energies(SIGNAL + 0.5 * gaussian(BATCHES, M, N, seed=seed))
        signals.append(signal.value)
        errors.append(signal.error)
        assert noise == pytest.approx(0.25 * M * N, rel=0.03)
    spread = torch.tensor(signals)
    # Unbiased, though the mean of 32 batches holds noise of energy 7.5 beside the signal's 13.
    assert abs(float(spread.mean()) - 13.0) < 4 * float(spread.std()) / math.sqrt(40)
    assert float(torch.tensor(errors).mean()) == pytest.approx(float(spread.std()), rel=0.3)


def test_without_a_signal_its_energy_is_zero_within_its_error_and_nothing_stands_above_the_floor() -> None:
    stack = gaussian(BATCHES, M, N, seed=5)
    signal, _ = energies(stack)
    assert abs(signal.value) < 3 * signal.error
    assert noise_structure(stack, 2).above_floor <= 1


def test_the_mean_of_a_clean_signal_stands_above_the_floor_by_its_rank() -> None:
    structure = noise_structure(SIGNAL + 0.05 * gaussian(BATCHES, M, N, seed=0), 2)
    assert structure.above_floor == 2
    torch.testing.assert_close(
        structure.mean_spectrum[:2], torch.tensor([3.0, 2.0], dtype=torch.float64), rtol=0.01, atol=0
    )
    # The floor is what the rest of the mean is: noise of standard deviation 0.05/√32.
    torch.testing.assert_close(structure.floor_spectrum[2:10], structure.mean_spectrum[2:10], rtol=0.25, atol=0)


@pytest.mark.parametrize("is_tall", [False, True])
def test_noise_in_the_directions_of_the_signal_overlaps_it_and_other_noise_does_not(is_tall: bool) -> None:
    weights = gaussian(BATCHES, 2, seed=3)

    def built(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        spike = torch.einsum("bk,mk,nk->bmn", 4 * weights, left, right)
        stack = SIGNAL + spike + 0.01 * gaussian(BATCHES, M, N, seed=4)
        return stack.mT if is_tall else stack

    # Left directions shared, right ones orthogonal to the signal's.
    half = noise_structure(built(U[:, :2], V[:, 2:4]), 2)
    left, right = (half.right, half.left) if is_tall else (half.left, half.right)
    assert left.share.value > 0.95
    assert right.share.value < 0.1
    assert max(left.angles) < 15
    assert min(right.angles) > 70
    assert (left.expected, right.expected) == (2 / M, 2 / N)
    again, other = (
        (half.recurring_right, half.recurring_left) if is_tall else (half.recurring_left, half.recurring_right)
    )
    assert again.share.value > 0.85
    assert other.share.value > 0.85
    assert (again.expected, other.expected) == (2 / M, 2 / N)


def test_isotropic_noise_overlaps_the_signal_as_by_chance() -> None:
    structure = noise_structure(low_rank(U, V, [30.0, 20.0]) + gaussian(64, M, N, seed=7), 2)
    for side in (structure.left, structure.right, structure.recurring_left, structure.recurring_right):
        assert side.share.value == pytest.approx(side.expected, abs=4 * side.share.error)


def test_overlap_of_a_space_with_itself_and_with_its_complement() -> None:
    assert overlap(U[:, :2], U[:, :2] @ basis(2, 2, seed=0)).share.value == pytest.approx(1)
    assert overlap(U[:, :2], U[:, 2:4]).share.value == pytest.approx(0, abs=1e-12)
    tilted = torch.cat([U[:, :1], (U[:, 1:2] + U[:, 2:3]) / math.sqrt(2)], dim=1)
    assert overlap(U[:, :2], tilted).angles == pytest.approx((0.0, 45.0), abs=1e-5)
    assert overlap(U[:, :2], tilted).share.value == pytest.approx(0.75)


def test_localisation_is_one_for_single_entries_and_as_expected_for_a_gaussian() -> None:
    spikes = 1e-3 * gaussian(8, 64, 96, seed=0)
    for batch in range(8):
        spikes[batch, 7 * batch, 5 * batch] += 1.0
    assert noise_structure(spikes, 1).localisation.value > 0.95
    found = noise_structure(gaussian(16, 64, 96, seed=1), 1)
    assert found.localisation.value == pytest.approx(found.gaussian_localisation, rel=0.1)
    assert gaussian_localisation(64, 96) == pytest.approx(math.sqrt(2 * math.log(64 * 96)) / (8 + math.sqrt(96)))


def test_the_noise_spectrum_is_unbiased_for_few_batches() -> None:
    found = noise_structure(gaussian(6, M, N, seed=2), 1).noise_spectrum
    exact = torch.linalg.svdvals(gaussian(200, M, N, seed=3)).mean(0)
    torch.testing.assert_close(found, exact, rtol=0.06, atol=0)


def test_bad_stacks_are_refused_by_what_they_are() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 4, 5\).*at least 4 batches"):
        energies(torch.zeros(3, 4, 5))
    with pytest.raises(ValueError, match="not finite"):
        energies(torch.full((4, 2, 2), math.nan))
    with pytest.raises(ValueError, match=r"rank=0.*expected 1 to 2"):
        noise_structure(torch.zeros(4, 2, 3), 0)
