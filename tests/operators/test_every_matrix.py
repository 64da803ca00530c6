"""What holds for every finite matrix, tried on spectra that are hard: few large values over a small bulk, low rank,
values spread over decades, equal entries, and entries at both ends of a dtype's range.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
import spectra
from spectrim.operators import hard_clip, orthogonalize, soft_clip

SIDES = st.sampled_from([1, 2, 5, 17, 40, 64, 65, 66, 80, 97, 130])
exponents = st.floats(-2, 2)
hard = settings(max_examples=40, deadline=None)
CLIPS = {
    "soft_clip": lambda X, c: soft_clip(X, c, precision="exact"),
    "rational": lambda X, c: soft_clip(X, c, solver="rational"),
    "reference": lambda X, c: soft_clip(X, c, solver="reference"),
    "minimax": lambda X, c: soft_clip(X, c, solver="minimax"),
    "hard_clip": hard_clip,
}


def expected(name, X, c):
    return (oracle.hard_clip if name == "hard_clip" else oracle.soft_clip)(X, c)


@st.composite
def hard_matrices(draw, largest_ratio: float) -> torch.Tensor:
    """A float64 matrix to be clipped at one, with a largest singular value of up to about the ratio."""
    m, n, seed = draw(SIDES), draw(SIDES), draw(st.integers(0, 10**6))
    torch.manual_seed(seed)
    top = 10 ** draw(st.floats(-1, torch.tensor(largest_ratio).log10().item()))
    if draw(st.integers(0, 4)) == 0:  # equal entries, whose rounding adds up in step
        noise = draw(st.sampled_from([0.0, 1e-7, 1e-3]))
        return torch.full((m, n), top / (m * n) ** 0.5).double() * (1 + noise * torch.randn(m, n, dtype=torch.float64))
    k = min(m, n)
    sigma = 10 ** draw(st.floats(-6, 1)) * (0.5 + torch.rand(k, dtype=torch.float64))
    few = min(k, draw(st.sampled_from([0, 1, 2, 10, 16, 17, 40])))
    decades = draw(st.sampled_from([0.0, 0.5, 4.0]))
    sigma[:few] = top * 10 ** (-decades * torch.rand(few, dtype=torch.float64))
    if draw(st.integers(0, 3)) == 0:
        sigma = top * torch.logspace(0, -draw(st.floats(0, 9)), k, dtype=torch.float64)
    return spectra.matrix(m, n, sigma.clamp(max=largest_ratio), seed)


@pytest.mark.parametrize("name", CLIPS)
@hard
@given(hard_matrices(1e4), st.sampled_from([torch.float32, torch.float64]), exponents)
def test_clipping_is_accurate_and_bounded(name, X, dtype, exponent):
    if name == "minimax":
        X = X / max(1.0, oracle.norm(X).item() / 1e3)
    scale = 10**exponent
    X, c = (X * scale).to(dtype), torch.tensor(scale, dtype=dtype).item()
    clipped = CLIPS[name](X, c)
    assert oracle.relative_error(clipped, expected(name, X, c)) < 1e-3
    assert oracle.norm(clipped) <= c * (1 + 1e-5)


@pytest.mark.parametrize("name", CLIPS)
@hard
@given(
    hard_matrices(1e13),
    st.sampled_from([(torch.float32, 37), (torch.float64, 290), (torch.bfloat16, 37), (torch.float16, 4)]),
    st.floats(-1, 1),
)
def test_clipping_is_finite_and_bounded_beyond(name, X, kind, exponent):
    dtype, most = kind
    scale = 10.0 ** (most * exponent)
    info = torch.finfo(dtype)
    X, c = (X * scale).clamp(info.min, info.max).to(dtype), torch.tensor(scale, dtype=torch.float64)
    clipped = CLIPS[name](X, c if dtype == torch.float64 else c.float())
    assert clipped.dtype == dtype
    assert clipped.isfinite().all()
    rounding = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 0.0)
    # Below the smallest normal number of the dtype an entry is rounded by no share of itself.
    smallest = info.tiny * info.eps * max(X.shape)
    assert oracle.norm(clipped / c) <= 1 + 1e-5 + rounding + smallest / scale


@pytest.mark.parametrize("solver", ["reference", "minimax"])
@hard
@given(hard_matrices(1e13), st.sampled_from([torch.float32, torch.float64]), st.floats(-30, 30))
def test_the_polar_factor_is_finite_and_bounded(solver, X, dtype, exponent):
    info = torch.finfo(dtype)
    polar = orthogonalize((X * 10**exponent).clamp(info.min, info.max).to(dtype), solver=solver)
    assert polar.isfinite().all()
    assert oracle.norm(polar) <= 1 + 1e-5


@hard
@given(hard_matrices(1e4))
def test_the_polar_factor_is_right_wherever_no_value_is_at_the_edge_of_rounding(X):
    polar = orthogonalize(X.float())
    U, sigma, Vh = torch.linalg.svd(X.float().double(), full_matrices=False)
    floor = max(X.shape) * torch.finfo(torch.float32).eps * sigma[0]
    if not ((sigma > floor / 2) & (sigma < 2 * floor)).any():
        assert oracle.relative_error(polar, (U * (sigma > floor)) @ Vh) < 1e-5


def test_matrices_of_a_stack_do_not_meet_whatever_their_scale_and_threshold():
    scales = [1e-30, 1e-3, 1.0, 1e30]
    X = torch.stack([spectra.with_spectrum("ten spikes", 70, 90, i) * scale for i, scale in enumerate(scales)]).float()
    c = torch.tensor([scale / 10 ** (i + 1) for i, scale in enumerate(scales)])
    for name, clip in CLIPS.items():
        together = clip(X, c)
        for i in range(4):
            reach = 1e3 if name == "minimax" else 1e4
            if scales[i] / c[i] <= reach:
                assert oracle.relative_error(together[i], expected(name, X[i], c[i])) < 1e-3
            if name != "minimax":  # each for itself, to the bit
                assert torch.equal(clip(X[i], c[i]), together[i])


@pytest.mark.parametrize(("m", "n", "c"), [(65, 65, 1e-3), (96, 96, 1e-2), (128, 128, 1e-2), (128, 128, 1e-6)])
def test_a_matrix_of_ones_is_clipped(m, n, c):
    clipped = soft_clip(torch.ones(m, n), c)
    assert oracle.relative_error(clipped, oracle.soft_clip(torch.ones(m, n), c)) < 1e-3
    assert oracle.norm(clipped) <= c * (1 + 1e-5)


def test_a_decomposition_that_fails_is_tried_the_other_way(monkeypatch):
    svd, calls = torch.linalg.svd, []

    def once_failing(A, full_matrices=True):
        calls.append(A.shape)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("did not converge")
        return svd(A, full_matrices=full_matrices)

    X = spectra.matrix(20, 30, torch.logspace(0, -8, 20))
    monkeypatch.setattr(torch.linalg, "svd", once_failing)
    clipped = soft_clip(X, 1e-6, solver="reference")
    assert calls == [(20, 30), (30, 20)]
    monkeypatch.undo()
    assert oracle.relative_error(clipped, oracle.soft_clip(X, 1e-6)) < 1e-9
