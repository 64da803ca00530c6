"""The functions behind the fast solvers: each approximates what it says, and no other does better."""

import pytest
import torch

import spectra
from spectrim.operators import soft_clip
from spectrim.operators._symmetric import add_resolvents_, gram_matrix, inverse_, mirror_
from spectrim.operators._symmetric import reflect as apply_reflector
from spectrim.operators.minimax import minimax_quintic, steps_to_reach
from spectrim.operators.rational import (
    POWER_MARGIN,
    add_far_resolvent_,
    largest_eigenvalue,
    spike_reflector,
    zolotarev,
)


@pytest.mark.parametrize("poles", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("kappa", [1.01, 3.0, 1e2, 1e4, 1e8])
def test_the_rational_function_equioscillates_with_the_error_it_states(kappa, poles):
    scale, weights, shifts, error = zolotarev(kappa, poles)
    x = torch.logspace(0, torch.tensor(kappa).log10().item(), 50001, dtype=torch.float64)
    value = scale * (1 + sum(a / (x + p) for a, p in zip(weights, shifts, strict=True)))
    deviation = value * x.sqrt() - 1
    assert min(weights) > 0
    assert min(shifts) > 0
    assert deviation.abs().max().item() == pytest.approx(error, rel=1e-3, abs=1e-13)
    if error > 1e-9:  # 2r + 2 extremes of alternating sign: by Chebyshev's criterion none is better
        extremes = deviation[deviation.abs() > 0.999 * error].sign()
        changes = (extremes[1:] != extremes[:-1]).sum().item()
        assert changes >= 2 * poles + 1


@pytest.mark.parametrize("low", [1e-4, 1e-2, 0.1, 0.5, 0.8])
def test_the_quintic_equioscillates_on_its_interval(low):
    a, b, c, lowest = minimax_quintic(low)
    x = torch.linspace(low, 1, 200001, dtype=torch.float64)
    p = a * x + b * x**3 + c * x**5
    assert p.max().item() == pytest.approx(1.0, abs=1e-6)
    assert p.min().item() == pytest.approx(lowest, rel=1e-5)
    middle = (1 + lowest) / 2
    extremes = (p - middle)[(p - middle).abs() > 0.9999 * (1 - middle)].sign()
    assert (extremes[1:] != extremes[:-1]).sum().item() >= 3


def test_more_is_needed_for_a_longer_interval():
    steps = [steps_to_reach(low) for low in (0.9999, 0.5, 0.1, 1e-2, 1e-3, 1e-4)]
    assert steps == sorted(steps)
    assert steps[0] == 1
    assert steps[-2] <= 7


@pytest.mark.parametrize("m", [1, 20, 65, 100, 256, 400])
@pytest.mark.parametrize("ratio", [30.0, 300.0, 1e3])
def test_the_steps_suffice_where_the_bound_on_the_norm_is_at_its_loosest(m, ratio):
    X = torch.eye(m)
    expected = 1 / (1 + ratio**2) ** 0.5
    torch.testing.assert_close(soft_clip(X, 1 / ratio, solver="minimax"), X * expected, rtol=2e-4, atol=1e-12)


@pytest.mark.parametrize("ratio", [1e3, 1e5, 1e8])
def test_a_bound_on_the_norm_that_is_tight_does_not_let_rounding_blow_up(ratio):
    X = spectra.matrix(300, 400, spectra.one_spike(300)).float()
    clipped = soft_clip(X, 1 / ratio, solver="minimax")
    assert torch.linalg.matrix_norm(clipped, ord=2) <= (1 + 1e-3) / ratio


@pytest.mark.parametrize("n", [1, 5, 257, 400])
def test_the_recursive_inverse_is_an_inverse_also_of_a_graded_stack(n):
    A = torch.stack([spectra.matrix(n, n, spectra.ten_spikes(n), seed) for seed in range(2)])
    A = torch.eye(n, dtype=torch.float64) + 1e3 * A @ A.mT
    torch.testing.assert_close(inverse_(A.clone()), torch.linalg.inv(A))
    torch.testing.assert_close(inverse_(A.clone(), leaf=3), torch.linalg.inv(A))


@pytest.mark.parametrize("m", [1, 10, 130, 383, 384, 600])
@pytest.mark.parametrize("n", [1, 150])
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reflected", [False, True])
def test_the_gram_matrix_is_a_product(m, n, by_columns, dtype, reflected):
    X = torch.randn(2, n, m, dtype=dtype).mT if by_columns else torch.randn(2, m, n, dtype=dtype)
    c = torch.tensor([0.5, 3.0], dtype=dtype)[:, None, None]
    reflector = spike_reflector(X, c, min(m, n, 7)) if reflected else None
    Z = (X if reflector is None else apply_reflector(X, reflector)) / c
    gram = gram_matrix(X, c, reflector)
    assert gram.is_contiguous()
    exact = Z.double() @ Z.double().mT
    error = torch.linalg.matrix_norm(gram.double() - exact) / torch.linalg.matrix_norm(exact)
    assert error.max() < (2e-6 if dtype == torch.float32 else 1e-14)
    assert torch.equal(gram, gram.mT)


@pytest.mark.parametrize("n", [1, 127, 128, 200, 321])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resolvents_are_weighted_inverses_also_of_a_graded_stack(n, dtype):
    X = torch.stack([spectra.matrix(n, n, spectra.ten_spikes(n), seed) for seed in range(2)])
    gram = (300 * X @ X.mT).to(dtype)
    weights, shifts = [[1.0, 2.0, 3.0], [0.5, 0.1, 4.0]], [[1.0, 3.0, 50.0], [1.5, 7.0, 9.0]]
    root = torch.eye(n, dtype=dtype).repeat(2, 1, 1)
    norm, inner = add_resolvents_(root, gram, weights, shifts)
    mirror_(root)
    for i in range(2):
        inverses = [
            torch.linalg.inv(gram[i].double() + shift * torch.eye(n, dtype=torch.float64)) for shift in shifts[i]
        ]
        exact = torch.eye(n) + sum(w * inverse for w, inverse in zip(weights[i], inverses, strict=True))
        rough = 2e-4 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(root[i].double(), exact, rtol=rough, atol=rough)
        torch.testing.assert_close(norm[i].double(), torch.linalg.matrix_norm(inverses[0]), rtol=rough, atol=0)
        torch.testing.assert_close(inner[i].double(), (gram[i].double() * inverses[0]).sum(), rtol=rough, atol=0)


def test_the_reflection_is_orthogonal_and_moves_the_spike_into_the_first_rows():
    X = torch.stack([spectra.with_spectrum("ten spikes", 90, 110), torch.zeros(90, 110, dtype=torch.float64)])
    reflector = spike_reflector(X, torch.ones(1, 1, dtype=torch.float64), 16)
    H = apply_reflector(torch.eye(90, dtype=torch.float64).expand(2, 90, 90), reflector)
    torch.testing.assert_close(H @ H.mT, torch.eye(90, dtype=torch.float64).expand(2, 90, 90))
    moved = apply_reflector(X, reflector)
    assert torch.linalg.matrix_norm(moved[0, 16:], ord=2) < 0.05 * torch.linalg.matrix_norm(X[0], ord=2)


@pytest.mark.parametrize("spectrum", spectra.SPECTRA)
def test_the_estimate_of_the_largest_eigenvalue_is_within_its_margin(spectrum):
    X = spectra.with_spectrum(spectrum, 200, 300)
    assert 1 / POWER_MARGIN < largest_eigenvalue(X @ X.mT).item() <= 1 + 1e-9


def test_a_far_resolvent_is_one_to_within_the_error_of_the_line():
    sigma = torch.cat([torch.linspace(50, 20, 8), torch.linspace(3, 0, 92)])
    X = torch.stack([spectra.matrix(100, 120, sigma, seed) for seed in range(2)])
    gram = X @ X.mT
    H = spike_reflector(X, torch.ones(1, 1, dtype=torch.float64), 16)
    gram = apply_reflector(apply_reflector(gram, H).mT, H)
    tail = torch.linalg.eigvalsh(gram[..., 16:, 16:])[..., -1, None, None]
    shift = torch.tensor([1e3, 5e3], dtype=torch.float64)[:, None, None]
    weight = torch.tensor([1.0, 3.0], dtype=torch.float64)[:, None, None]
    exact = torch.linalg.inv(gram + shift * torch.eye(100, dtype=torch.float64))
    error = torch.linalg.matrix_norm(
        add_far_resolvent_(torch.ones_like(gram), gram, weight, shift, tail, 16) - weight * exact - 1, ord=2
    )
    line = (shift.rsqrt() - (shift + tail).rsqrt()).square()[:, 0, 0] / 2
    assert (error <= 1.01 * weight[:, 0, 0] * line).all()
