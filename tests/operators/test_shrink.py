"""Entry-wise shrinkage against its closed forms in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.operators import entry_scale, smooth_shrink

FORMS = {
    "redescending": lambda y, tau: y / (1 + (y / tau) ** 2),
    "monotone": lambda y, tau: y / torch.sqrt(1 + (y / tau) ** 2),
    "hard": lambda y, tau: torch.clamp(y, -tau, tau),
}
numbers = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=80, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=20), st.floats(1e-3, 1e3), st.sampled_from(sorted(FORMS)))
def test_smooth_shrink_is_its_closed_form_and_odd(entries, tau, form):
    y = torch.tensor(entries)
    shrunk = smooth_shrink(y, tau, form=form)
    torch.testing.assert_close(shrunk.double(), FORMS[form](y.double(), tau), rtol=1e-6, atol=1e-30)
    assert torch.equal(smooth_shrink(-y, tau, form=form), -shrunk)


@pytest.mark.parametrize("form", FORMS)
def test_smooth_shrink_takes_one_threshold_per_matrix(form):
    G = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    tau = torch.tensor([0.1, 1.0, 10.0])
    expected = FORMS[form](G.double(), tau.double()[:, None, None].expand(3, 4, 5))
    torch.testing.assert_close(smooth_shrink(G, tau, form=form).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (1, 1), (3, 0), (2, 3, 4)])
def test_any_shape_comes_back_and_zero_stays_zero_even_with_a_zero_threshold(shape, form):
    for tau in (2.0, torch.zeros(shape[:-2])):
        assert torch.equal(smooth_shrink(torch.zeros(shape), tau, form=form), torch.zeros(shape))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("repeat", [1, 50_000])  # the larger is shrunk block by block
def test_shrinking_is_its_closed_form_at_both_ends_of_the_range(form, repeat):
    y = torch.tensor([0.0, 1e-45, -1e-40, 1e-38, 3e-20, -1.0, 7e18, 1e30, -3e38]).repeat(repeat)
    for tau in (2e-38, 1e-20, 1.0, 1e30, 3.4e38):
        for given_tau in (tau, torch.tensor(tau)):
            shrunk = smooth_shrink(y, given_tau, form=form)
            expected = FORMS[form](y.double(), torch.tensor(tau).double())
            # Below the smallest normal number, and below 1e-19 of τ, digits are lost.
            torch.testing.assert_close(shrunk.double(), expected, rtol=1e-6, atol=max(1e-44, 1e-18 * tau))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [9, 600_000])
def test_a_threshold_of_next_to_nothing_leaves_next_to_nothing(form, size):
    y = torch.randn(size)
    y[:3] = torch.tensor([1e-45, 0.0, 3e38])
    for tau in (torch.zeros(()), torch.tensor(1e-45), torch.tensor(1e-39)):
        assert (smooth_shrink(y, tau, form=form).abs() <= tau).all()
    y[5] = torch.nan
    assert smooth_shrink(y, torch.zeros(()), form=form)[5].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_is_kept_and_the_argument_not_written_to(dtype):
    y = torch.tensor([0.5, -3.0, 100.0]).to(dtype)
    before = y.clone()
    shrunk = smooth_shrink(y, 2.0)
    assert shrunk.dtype == dtype
    assert torch.equal(y, before)
    torch.testing.assert_close(shrunk, FORMS["redescending"](y.double(), 2.0).to(dtype))


def test_entry_scale_is_the_standard_deviation_of_gaussian_entries_and_survives_cauchy_noise():
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(400, 500, generator=generator) * 3
    assert entry_scale(G).item() == pytest.approx(3.0, rel=1e-2)
    hit = torch.rand(400, 500, generator=generator) < 0.01
    noise = torch.empty(400, 500).cauchy_(generator=generator) * hit
    assert entry_scale(G + noise).item() == pytest.approx(3.0, rel=3e-2)


@pytest.mark.parametrize("size", [30, 600_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [-44, -38, -20, 0, 20, 38])
def test_entry_scale_neither_overflows_nor_vanishes(size, dtype, exponent):
    y = torch.linspace(1, 3.4, size, dtype=torch.float64).mul(10.0**exponent).to(dtype)
    expected = y.double().sqrt().mean().square() / 0.675978
    torch.testing.assert_close(
        entry_scale(y).double(), expected.clamp(max=torch.finfo(dtype).max), rtol=1e-5, atol=1.5e-45
    )


def test_entry_scale_gives_one_number_per_matrix():
    G = torch.randn(2, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    each = torch.stack([entry_scale(G[i, j]) for i in range(2) for j in range(3)]).view(2, 3)
    torch.testing.assert_close(entry_scale(G), each)
    assert entry_scale(G[0, 0, 0]).shape == entry_scale(torch.tensor(2.0)).shape == ()
    assert torch.equal(entry_scale(torch.zeros(2, 3, 4)), torch.zeros(2))
    assert torch.equal(entry_scale(torch.zeros(0)), torch.tensor(0.0))


def test_bad_arguments_are_named_with_what_is_allowed():
    with pytest.raises(ValueError, match=r"form='soft': expected one of 'redescending'"):
        smooth_shrink(torch.ones(3), 1.0, form="soft")
    with pytest.raises(ValueError, match=r"tau=-1\.0: expected a positive"):
        smooth_shrink(torch.ones(3), -1.0)


@pytest.mark.parametrize("form", ["redescending", "monotone", "hard"])
@pytest.mark.parametrize("shape", [(700, 800), (2, 600, 500), (600_000,)])
def test_large_tensors_are_shrunk_block_by_block_to_the_same_result(form, shape):
    y = torch.randn(shape, dtype=torch.float64) * torch.logspace(-3, 3, shape[-1], dtype=torch.float64)
    y.view(-1)[::7] = 0
    scale = entry_scale(y)
    rows = y if y.ndim > 1 else y[None]
    expected = rows.abs().sqrt().mean((-2, -1)).square() / 0.675978
    torch.testing.assert_close(scale, expected.reshape(y.shape[:-2]), rtol=1e-5, atol=0)
    tau = 3 * scale
    t = rows / tau.reshape(*y.shape[:-2], 1, 1)
    shrunk = {
        "redescending": rows / (1 + t * t),
        "monotone": rows / (1 + t * t).sqrt(),
        "hard": rows / t.abs().clamp(1),
    }
    torch.testing.assert_close(smooth_shrink(y, tau, form=form), shrunk[form].reshape(shape))
    torch.testing.assert_close(smooth_shrink(y.float(), tau.float(), form=form).double(), shrunk[form].reshape(shape),
                               rtol=1e-5, atol=1e-9)  # fmt: skip


@pytest.mark.parametrize("form", ["redescending", "monotone", "hard"])
def test_blocks_take_extremes(form):
    y = torch.randn(600_000)
    y[0], y[1] = 3e38, -3e38
    assert smooth_shrink(y, entry_scale(y), form=form).isfinite().all()
    zero = torch.zeros(600_000)
    assert entry_scale(zero) == 0
    assert (smooth_shrink(zero, entry_scale(zero), form=form) == 0).all()
    assert (smooth_shrink(y, torch.zeros(()), form=form) == 0).all()
    for value in (torch.nan, torch.inf):
        for size in (7, 600_000):
            assert entry_scale(torch.full((size,), value)).isnan()
