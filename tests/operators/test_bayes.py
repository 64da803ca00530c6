"""The Faddeeva function against scipy's, and the Bayes estimate against its defining integrals."""

import itertools

import numpy as np
import pytest
import torch
from scipy import integrate, special

from spectrim.operators import bayes_shrink
from spectrim.operators.faddeeva import faddeeva


def test_the_faddeeva_function_matches_scipy_over_the_upper_half_plane():
    x = np.concatenate([-np.logspace(-8, 6, 120), [0], np.logspace(-8, 6, 121)])
    y = np.concatenate([[0], np.logspace(-3, 6, 100)])
    z = x[:, None] + 1j * y[None, :]
    ours = faddeeva(torch.from_numpy(z)).numpy()
    assert np.abs(ours / special.wofz(z) - 1).max() < 1e-11
    real = ours.real[:, 1:], special.wofz(z).real[:, 1:]
    assert np.abs(real[0] / real[1] - 1).max() < 1e-6  # the real part by itself, where it is a millionth of |w|


def posterior_mean(y, sigma, gamma, contamination):
    """E[x|y] by quadrature over x, from Gaussian and Cauchy densities; noise of zero is a point mass."""

    def joint(x):
        return (
            np.exp(-0.5 * (x / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi)) * gamma / np.pi / (gamma**2 + (y - x) ** 2)
        )

    def integral(f):
        marks = sorted(
            {-12 * sigma, 12 * sigma, *np.clip([y - 30 * gamma, y, y + 30 * gamma], -12 * sigma, 12 * sigma)}
        )
        pairs = itertools.pairwise(marks)
        return sum(integrate.quad(f, a, b, epsabs=0, epsrel=1e-11, limit=400)[0] for a, b in pairs if a < b)

    clean = (1 - contamination) * np.exp(-0.5 * (y / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
    noisy, mean = contamination * integral(joint), contamination * integral(lambda x: x * joint(x))
    return (mean + clean * y) / (noisy + clean)


@pytest.mark.parametrize("contamination", [0.01, 0.3, 1.0])
@pytest.mark.parametrize(("sigma", "gamma"), [(1.0, 1.0), (1.0, 0.05), (0.3, 5.0), (20.0, 1.0)])
def test_the_bayes_estimate_matches_quadrature(sigma, gamma, contamination):
    y = sigma * np.array([-30.0, -6.0, -2.0, -0.5, 0.1, 1.0, 3.0, 8.0, 100.0])
    expected = np.array([posterior_mean(value, sigma, gamma, contamination) for value in y])
    ours = bayes_shrink(torch.from_numpy(y), sigma, gamma, contamination=contamination).numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-9 * sigma)


def test_the_bayes_estimate_redescends_as_two_variances_over_y():
    y = torch.tensor([1e3, 1e5], dtype=torch.float64)
    torch.testing.assert_close(bayes_shrink(y, 2.0, 1.0), 2 * 4.0 / y, rtol=1e-2, atol=0)


def test_the_bayes_estimate_without_noise_is_the_identity_and_keeps_shape_and_dtype():
    G = torch.tensor([[0.5, -2.0], [0.0, 9.0]], dtype=torch.bfloat16)
    assert torch.equal(bayes_shrink(G, 1.0, 0.0), G)
    assert torch.equal(bayes_shrink(G, 1.0, 1.0, contamination=0.0), G)
    shrunk = bayes_shrink(G, 1.0, 1.0)
    assert shrunk.dtype == G.dtype
    assert shrunk.shape == G.shape
    assert torch.equal(bayes_shrink(-G, 1.0, 1.0), -shrunk)


def test_bad_arguments_are_named_with_what_is_allowed():
    G = torch.ones(2)
    with pytest.raises(ValueError, match=r"sigma=0\.0: expected a positive"):
        bayes_shrink(G, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"gamma=-1\.0: expected"):
        bayes_shrink(G, 1.0, -1.0)
    with pytest.raises(ValueError, match=r"contamination=1\.5: expected a number from 0 to 1"):
        bayes_shrink(G, 1.0, 1.0, contamination=1.5)
