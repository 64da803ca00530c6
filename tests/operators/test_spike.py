"""The spike: how much energy is followed, and the shaped matrix against its formula in float64."""

import pytest
import torch

import oracle
import spectra
from spectrim.operators import shape_spike, spike_correction, track_spike


def captured(M, U):
    """Energy in the span of U over the most that any subspace of its rank holds."""
    best = torch.linalg.svdvals(M.double())[..., : U.shape[-1]].square().sum()
    return ((U.double().mT @ M.double()).square().sum() / best).item()


def rotation(n, angle, generator):
    A = torch.randn(n, n, generator=generator, dtype=torch.float64)
    A = A - A.mT
    return torch.matrix_exp(A * (angle / torch.linalg.matrix_norm(A, ord=2)))


@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (64, 64)])
def test_one_warm_step_follows_a_slowly_turning_matrix(shape):
    generator = torch.Generator().manual_seed(0)
    m, n = shape
    M = spectra.matrix(m, n, spectra.ten_spikes(min(m, n)))
    left, right = rotation(m, 0.05, generator), rotation(n, 0.05, generator)
    V = V_of_six = None
    for _ in range(20):
        spike = track_spike(M.float(), V, rank=10)
        assert captured(M, spike.U) > 0.99
        six = track_spike(M.float(), V_of_six, rank=6)
        V, V_of_six = spike.V, six.V
        last, M = M, left @ M @ right
    assert captured(last, six.U) > 0.99  # no gap after the sixth value: found only with time


def test_a_sudden_change_is_followed_within_a_few_steps():
    V = track_spike(spectra.with_spectrum("ten spikes", 60, 80, seed=1).float(), None, rank=10).V
    M = spectra.with_spectrum("ten spikes", 60, 80, seed=2).float()
    for _ in range(3):
        spike = track_spike(M, V)
        V = spike.V
    assert captured(M, spike.U) > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (3, 40, 64), (2, 2, 12, 9)])
def test_the_shaped_matrix_and_its_norm_match_the_formula(shape, dtype):
    M = torch.stack([spectra.with_spectrum("ten spikes", *shape[-2:], seed=seed) for seed in range(4)])
    M = (M[: max(1, torch.Size(shape[:-2]).numel())].reshape(shape) * 50).to(dtype)
    before = M.clone()
    spike = track_spike(M, None, rank=4)
    shaped = shape_spike(M, spike)
    assert shaped.dtype == dtype
    assert torch.equal(M, before)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    assert {part.dtype for part in spike} == {working}
    flat = [part.reshape(-1, *part.shape[-2:]) for part in (M, spike.U, spike.V, shaped)]
    correction = spike_correction(M, spike)
    assert correction.norm.shape == M.shape[:-2]
    rough = {torch.bfloat16: 4e-3, torch.float16: 5e-4}.get(dtype, 1e-5)
    for M_i, U, V, O_i in zip(*flat, strict=True):
        assert oracle.relative_error(O_i, oracle.shape_spike(M_i, U, V)) < rough
    formed = M.double() + (correction.U @ correction.right.mT).double()
    torch.testing.assert_close(correction.norm.double(), torch.linalg.matrix_norm(formed), rtol=1e-5, atol=0)


def test_the_norm_survives_a_spike_that_holds_nearly_all_energy():
    sigma = torch.full((50,), 1e-4)
    sigma[0] = 1.0  # the tail holds 5e-7 of the energy: float32 norms would cancel to nothing
    M = spectra.matrix(50, 70, sigma).float()
    spike = track_spike(M, None, rank=1)
    correction = spike_correction(M, spike)
    exact = torch.linalg.matrix_norm(oracle.shape_spike(M, spike.U, spike.V))
    torch.testing.assert_close(correction.norm.double(), exact, rtol=2e-2, atol=0)


@pytest.mark.parametrize("rank", [5, 8])
def test_a_spike_that_holds_everything_leaves_the_matrix_alone(rank):
    M = spectra.matrix(8, 12, torch.linspace(1, 0.5, 8) * (torch.arange(8) < 5)).float()
    spike = track_spike(M, None, rank=rank)
    assert torch.equal(shape_spike(M, spike), M)
    torch.testing.assert_close(spike_correction(M, spike).norm, torch.linalg.matrix_norm(M))


@pytest.mark.parametrize("shape", [(1, 1), (6, 9), (2, 9, 6)])
def test_zero_stays_zero_and_keeps_the_basis(shape):
    V = track_spike(torch.ones(shape), None, rank=1).V
    spike = track_spike(torch.zeros(shape), V)
    assert torch.equal(spike.V, V)
    assert torch.equal(shape_spike(torch.zeros(shape), spike), torch.zeros(shape))
    assert torch.equal(spike_correction(torch.zeros(shape), spike).norm, torch.zeros(shape[:-2]))


def test_the_rank_below_k_in_one_matrix_of_a_stack_changes_nothing_for_the_others():
    full, low = spectra.with_spectrum("ten spikes", 20, 30), spectra.matrix(20, 30, torch.eye(20)[0])
    both = torch.stack([full, low]).float()
    shaped = shape_spike(both, track_spike(both, None, rank=3))
    torch.testing.assert_close(shaped[0], shape_spike(both[0], track_spike(both[0], None, rank=3)))
    torch.testing.assert_close(shaped[1], both[1])


def test_large_and_small_entries_do_not_overflow():
    for size in (1e-30, 1e30):
        M = spectra.with_spectrum("ten spikes", 20, 30).float() * size
        spike = track_spike(M, None, rank=2)
        shaped, norm = shape_spike(M, spike), spike_correction(M, spike).norm
        assert shaped.isfinite().all()
        torch.testing.assert_close(norm.double(), torch.linalg.matrix_norm(shaped.double()), rtol=1e-4, atol=0)


def test_the_start_depends_on_nothing_but_the_shape():
    M = spectra.with_spectrum("ten spikes", 20, 30).float()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = track_spike(M, None, rank=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(track_spike(M, None, rank=3).V, first.V)
    assert captured(M, first.U) > 0.95


def test_bad_arguments_are_named_with_what_is_allowed():
    M = torch.ones(4, 6)
    for rank in (None, 0, 5):
        with pytest.raises(ValueError, match=rf"rank={rank} .*expected 1 to 4"):
            track_spike(M, None, rank=rank)
    with pytest.raises(ValueError, match=r"V of shape \(4, 2\).*expected .*6, k\)"):
        track_spike(M, torch.ones(4, 2))
    with pytest.raises(ValueError, match="steps=0"):
        track_spike(M, None, rank=2, steps=0)
