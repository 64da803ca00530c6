"""The soft clip and the polar factor in half precision, as a CPU rounds them: error, bound, finiteness, no reading."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim._muon import _zeropower_via_newtonschulz

import oracle
import spectra
from spectrim.operators.half import half_clip, half_polar

TORCHS_MUON = (3.4445, -4.7750, 2.0315), 5, 1e-7


@st.composite
def nasty(draw):
    """A stack of one float32 matrix of σ₁ about one: few or many large values, over what may be anything or nothing."""
    m, n = draw(st.integers(128, 176)), draw(st.integers(128, 176))
    k = min(m, n)
    index, large = torch.arange(k), draw(st.sampled_from([1, 2, 3, 5, 16, k // 8, k // 4, k // 2, 3 * k // 4, k]))
    bulk = draw(st.sampled_from([0.0, 1e-4, 1e-3, 1e-2, 0.1])) * torch.logspace(0, -draw(st.floats(0, 3)), k)
    top = torch.logspace(0, -draw(st.sampled_from([0, 0, 1, 3])), k) if draw(st.booleans()) else torch.ones(k)
    sigma = torch.where(index < large, top, torch.minimum(bulk, top))
    X = spectra.matrix(m, n, sigma, draw(st.integers(0, 99)))
    if draw(st.integers(0, 3)) == 0:
        X = spectra.with_spectrum("sign", m, n, draw(st.integers(0, 99)))
    return X[None].float()


def bound(result, c):
    return (oracle.norm(result) / c).max().item()


@settings(max_examples=60, deadline=None)
@given(nasty(), st.floats(0, 2))
def test_the_clip_is_within_one_percent_where_the_largest_value_is_a_hundred_times_the_threshold(X, decades):
    c = oracle.norm(X).item() / 10**decades
    clipped = half_clip([X], [c])[0]
    assert oracle.relative_error(clipped, oracle.soft_clip(X, c)) < 1e-2
    assert bound(clipped, c) < 1.01


@settings(max_examples=60, deadline=None)
@given(nasty(), st.floats(2, 8))
def test_nothing_exceeds_the_threshold_however_much_is_clipped(X, decades):
    c = oracle.norm(X).item() / 10**decades
    clipped = half_clip([X], [c])[0]
    assert bound(clipped, c) < (1.01 if decades <= 3 else 1.02)
    # What is large is clipped, not lost.
    assert bound(clipped, c) > 0.5 or decades > 3


@settings(max_examples=40, deadline=None)
@given(spectra.matrices(largest=40), st.floats(-1, 2))
def test_small_matrices_are_clipped_in_float32(X, decades):
    X = X.reshape(-1, *X.shape[-2:])
    c = oracle.norm(X) / 10**decades
    clipped = half_clip([X], [c])[0]
    assert oracle.relative_error(clipped, oracle.soft_clip(X, c)) < 6e-3


@pytest.mark.parametrize("side", [20, 140])
@pytest.mark.parametrize("size", [1e-44, 1e-42, 1e-38, 1e-30, 1e-10, 1e10, 1e30, 1e36])
def test_any_size_of_matrix_and_threshold_gives_something_finite_within_the_bound(side, size):
    X = (torch.randn(2, side, side + 9, generator=torch.Generator().manual_seed(0)) * size).float()
    for ratio in (1e-6, 1e-3, 1.0, 30.0, 1e6, 1e30):
        c = oracle.norm(X).max().item() / ratio
        if not 1e-44 < c < 1e300:
            continue
        clipped = half_clip([X], [c])[0]
        assert clipped.isfinite().all()
        assert bound(clipped, c) < 1.01 or c < 1e-40  # where float32 itself has few digits left
        if ratio <= 30 and size > 1e-37 and 1e-37 < c < 3e38:
            assert oracle.relative_error(clipped, oracle.soft_clip(X, c)) < 4e-3
    for steps in (None, 1, 5):
        polar = half_polar([X], steps=steps)[0]
        assert polar.isfinite().all()
        assert bound(polar, 1.0) < 1.4


def test_zeros_ones_a_single_entry_and_the_largest_numbers():
    single = torch.zeros(150, 150)
    single[0, 0] = 1
    X = torch.stack([torch.zeros(150, 150), torch.ones(150, 150), single, torch.full((150, 150), 3e38)])
    for c in (1e-6, 1e-2, 1.0, float("inf")):
        clipped = half_clip([X], [c])[0]
        assert clipped.isfinite().all()
        assert torch.equal(clipped[0], X[0])
        assert bound(clipped, c) < 1.02
    torch.testing.assert_close(half_clip([X[1:3]], [float("inf")])[0], X[1:3], rtol=2e-3, atol=1e-3)
    for steps in (None, 5):
        polar = half_polar([X], steps=steps)[0]
        assert torch.equal(polar[0], X[0])
        torch.testing.assert_close(oracle.norm(polar)[1:], torch.ones(3, dtype=torch.float64), rtol=0.1, atol=0)


@pytest.mark.parametrize("side", [20, 140])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_matrix_that_is_not_finite_spoils_no_other(side, poison):
    X = torch.randn(3, side, 150)
    bad = X.clone()
    bad[1, 2, 3] = poison
    for operator in (lambda X: half_clip([X, X[:1]], [1.0, 1.0]), lambda X: half_polar([X, X[:1]], steps=5)):
        for mine, expected in zip(operator(bad), operator(X), strict=True):
            assert torch.equal(mine[[0, -1]], expected[[0, -1]])


def stacks():
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    # Among them a transposed stack, and rows and columns of a larger one.
    return [random(2, 150, 160), 3 * random(1, 150, 150), random(3, 300, 150), random(2, 170, 150).mT]


def parts_of_larger_ones():
    return [*stacks(), torch.randn(4, 300, 200, generator=torch.Generator().manual_seed(1))[1:, :150, 7:180]]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("operator", ["clip", "polar", "rough polar"])
def test_a_list_of_stacks_gives_what_each_gives_alone(operator, overwrite):
    def run(given, **options):
        if operator == "clip":
            return half_clip(
                given, [0.5, torch.tensor(2.0), torch.tensor([1.0, 2, 30]), 2.0, 0.1][: len(given)], **options
            )
        return half_polar(given, steps=5 if operator == "rough polar" else None, **options)

    given = parts_of_larger_ones()
    together = run(given, overwrite=overwrite)
    alone = [
        half_clip([X], [c])[0] if operator == "clip" else run([X])[0]
        for X, c in zip(parts_of_larger_ones(), [0.5, 2.0, torch.tensor([1.0, 2, 30]), 2.0, 0.1], strict=True)
    ]
    for X, before, mine, expected in zip(given, parts_of_larger_ones(), together, alone, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, expected)
        assert torch.equal(X, mine if overwrite else before)


def test_the_clip_is_odd_and_commutes_with_transposition():
    X = stacks()[0]
    clipped = half_clip([X], [3.0])[0]
    assert torch.equal(half_clip([-X], [3.0])[0], -clipped)
    assert oracle.relative_error(half_clip([X.mT.contiguous()], [3.0])[0].mT, clipped.double()) < 2e-3


def test_stacks_without_matrices_or_entries_are_returned():
    none, empty, X = torch.zeros(0, 150, 160), torch.zeros(2, 150, 0), stacks()[0]
    assert half_clip([], []) == []
    assert [x.shape for x in half_clip([none], [1.0])] == [none.shape]
    assert [x.shape for x in half_polar([empty, empty.mT])] == [empty.shape, empty.mT.shape]
    assert torch.equal(half_clip([none, X], [1.0, 2.0])[1], half_clip([X], [2.0])[0])


def test_bad_arguments_are_named_with_what_is_allowed():
    X = stacks()[0]
    with pytest.raises(ValueError, match=r"\(150, 160\) and dtype torch.float32: expected \(E, m, n\)"):
        half_clip([X[0]], [1.0])
    with pytest.raises(ValueError, match=r"dtype torch.float64: expected .* float32"):
        half_polar([X.double()])
    with pytest.raises(ValueError, match=r"\(2, 150, 160\), \(2, 100, 160\): expected one smaller side"):
        half_polar([X, X[:, :100]])
    for c in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"threshold={c}: expected a positive number"):
            half_clip([X], [c])
    with pytest.raises(ValueError, match="2 thresholds for 1 stacks"):
        half_clip([X], [1.0, 2.0])
    with pytest.raises(ValueError, match="steps=0: expected a positive integer"):
        half_polar([X], steps=0)


def momenta():
    """Gaussian momentum, and momenta with a spike of growing height over a random or a decaying bulk."""
    generator = torch.Generator().manual_seed(0)
    k, noise = 160, torch.randn(160, 200, generator=generator, dtype=torch.float64)
    rank8 = torch.randn(160, 8, generator=generator) @ torch.randn(8, 200, generator=generator)
    index = torch.arange(k)
    return {
        "gaussian": noise,
        "square gaussian": noise[:, :160],
        "low rank and noise": rank8 + 0.3 * noise,
        "spike over a bulk": spectra.matrix(k, 200, torch.where(index < 3, 1.0, 0.02 + 0.03 * (index / k))),
        "high spike over a bulk": spectra.matrix(k, 200, torch.where(index < 3, 1.0, 0.005 + 0.001 * (index / k))),
        "power law": spectra.matrix(k, 200, 1 / (index + 1.0)),
        "geometric": spectra.matrix(k, 200, torch.logspace(0, -3, k)),
    }


def off(result):
    return (
        torch.linalg.matrix_norm(result @ result.mT - torch.eye(len(result), dtype=result.dtype)) / len(result) ** 0.5
    )


@pytest.mark.parametrize("kind", list(momenta()))
def test_five_steps_are_no_less_orthogonal_than_torchs_muon(kind):
    X = momenta()[kind].float()
    mine = half_polar([X[None]], steps=5)[0][0].double()
    torchs = _zeropower_via_newtonschulz(X, *TORCHS_MUON).double()
    assert off(mine) <= off(torchs)
    values, theirs = torch.linalg.svdvals(mine), torch.linalg.svdvals(torchs)
    assert values.max() < 1.09
    assert values.min() > min(0.9, theirs.min())


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 7, 9])
def test_other_numbers_of_steps_are_no_less_orthogonal_than_as_many_of_torchs_muon(steps):
    for X in momenta().values():
        mine = half_polar([X[None].float()], steps=steps)[0][0].double()
        coefficients, _, eps = TORCHS_MUON
        assert off(mine) <= 1.02 * off(_zeropower_via_newtonschulz(X.float(), coefficients, steps, eps).double())
        assert bound(mine, 1.0) < 1.23


@settings(max_examples=30, deadline=None)
@given(st.integers(128, 176), st.integers(128, 176), st.floats(0, 2), st.sampled_from([1, 4, 40]), st.integers(0, 99))
def test_the_accurate_polar_factor_is_within_one_percent_of_one(m, n, decades, large, seed):
    k = min(m, n)
    sigma = torch.where(torch.arange(k) < large, 1.0, torch.logspace(0, -decades, k))
    polar = half_polar([spectra.matrix(m, n, sigma, seed)[None].float()])[0][0].double()
    values = torch.linalg.svdvals(polar)
    assert values.min() > 0.99
    assert values.max() < 1.01


def test_the_polar_factor_has_the_singular_vectors_of_the_matrix():
    X = spectra.matrix(140, 170, torch.logspace(0, -2, 140))[None].float()
    assert oracle.relative_error(half_polar([X])[0], oracle.polar(X)) < 1e-2
    assert oracle.relative_error(half_polar([X], steps=5)[0], oracle.polar(X)) < 0.2


def run_all(given):
    return half_clip(given, [2.0] * len(given)) + half_polar(given, steps=5) + half_polar(given)


def test_nothing_is_read_from_the_device_and_no_fake_tensor_is_kept():
    with FakeTensorMode() as mode:
        given = [mode.from_tensor(X) for X in stacks()]
        for X, result in zip(given * 3, run_all(given), strict=True):
            assert result.shape == X.shape
        half_clip(given, [torch.tensor(2.0)] * len(given))
    assert all(type(result) is torch.Tensor for result in run_all(stacks()))


def test_a_compiler_sees_no_break_and_gives_the_same():
    compiled = torch.compile(run_all, backend="aot_eager", fullgraph=True)
    for mine, expected in zip(compiled(stacks()), run_all(stacks()), strict=True):
        assert oracle.relative_error(mine, expected.double()) < 2e-3
    given = stacks()
    overwriting = torch.compile(lambda X: half_clip(X, [2.0] * 4, overwrite=True), backend="aot_eager", fullgraph=True)
    for mine, X in zip(overwriting(given), given, strict=True):
        assert torch.equal(mine, X)
