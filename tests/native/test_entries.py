"""The passes in C against the same formulas in torch's words, in float64 where a sum or a root is at stake."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim import native
from spectrim.native import entries
from spectrim.native.library import serves
from spectrim.operators import smooth_shrink
from spectrim.optim.directions import adam, average, momentum, sign

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no kernels: {native.unavailable_because()}")

sizes = st.sampled_from([0, 1, 7, 63, 64, 65, 1000, 65536, 65537, 200_003])
scales = st.sampled_from([1e-42, 1e-20, 1e-3, 1.0, 1e15, 1e30])
few = settings(max_examples=25, deadline=None)


def numbers(size: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(size, generator=generator, dtype=torch.float64)).float()


@few
@given(sizes, scales)
def test_sums_are_those_of_float64(size, scale):
    x = numbers(size, scale)
    assert entries.sum_squares(x) == pytest.approx(float(x.double().square().sum()), rel=1e-12)
    assert entries.sum_roots(x) == pytest.approx(float(x.double().abs().sqrt().sum()), rel=1e-6)


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 70_000, 99_999])
def test_one_entry_that_is_not_finite_shows_in_the_sum(bad, place):
    x = numbers(100_000)
    x[place] = bad
    assert not torch.tensor(entries.sum_squares(x)).isfinite()


@few
@given(sizes, scales, st.sampled_from(["redescending", "monotone", "hard"]), st.booleans(), st.integers(1, 1000))
def test_shrunk_adam_is_shrinkage_then_adam_then_the_update(size, scale, form, maximize, step):
    grad, x, m, v = (numbers(size, s, seed) for seed, s in enumerate([scale, 1.0, 0.1 * scale, scale]))
    v = v.abs() * min(scale, 1e30)
    tau = 0.5 * scale
    expected = [tensor.double() for tensor in (x, m, v)]
    shrunk = smooth_shrink(grad.double(), tau, form=form) * (-1 if maximize else 1)
    settings_ = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
    direction = adam(shrunk, *expected[1:], torch.tensor(float(step)), **settings_)
    expected[0].mul_(1 - 1e-2 * 0.1).sub_(1e-2 * direction)
    entries.adam_step(
        x, grad, m, v, float(step), lr=1e-2, weight_decay=0.1, maximize=maximize, tau=tau, form=form, **settings_
    )
    overflows = expected[2] > torch.finfo(torch.float32).max
    for mine, exact, size in zip((x, m, v), expected, (1.0, scale, scale), strict=True):
        # Squares of small numbers vanish in float32, as torch's do.
        close = torch.isclose(
            mine.double(), exact, rtol=2e-5, atol=1e-6 * size + 1e-38 if exact is not expected[0] else 2e-3
        )
        assert (close | overflows).all()


@few
@given(sizes, st.sampled_from([0.0, 0.3, 0.9, 0.999]), st.integers(1, 100))
def test_the_adam_direction_is_the_formula(size, beta1, step):
    grad, m, v = numbers(size, 1e-3, 1), numbers(size, 1e-3, 2), numbers(size, 1e-6, 3).abs()
    expected = [tensor.double() for tensor in (grad, m, v)]
    exact = adam(*expected, torch.tensor(float(step)), beta1=beta1, beta2=0.95, eps=1e-8)
    mine = entries.adam_direction(grad, m, v, float(step), beta1=beta1, beta2=0.95, eps=1e-8)
    torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(m.double(), expected[1], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(v.double(), expected[2], rtol=1e-5, atol=1e-12)


@few
@given(sizes, st.sampled_from([0.0, 0.3, 0.95]), st.booleans(), st.sampled_from(["sum", "average", "sign"]))
def test_momentum_is_the_formula(size, decay, nesterov, kind):
    grad, buffer = numbers(size, 1.0, 1), numbers(size, 1.0, 2)
    exact_buffer = buffer.double()
    function = {"sum": momentum, "average": average, "sign": sign}[kind]
    exact = function(grad.double(), exact_buffer, decay=decay, nesterov=nesterov)
    mine = entries.momentum_step(
        grad, buffer, decay=decay, nesterov=nesterov, averages=kind == "average", sign=kind == "sign"
    )
    torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(buffer.double(), exact_buffer, rtol=1e-5, atol=1e-6)


def test_the_update_is_one_pass_and_is_seen_by_autograd():
    x, u = numbers(70_001, 1.0, 1), numbers(70_001, 1.0, 2)
    expected, version = 0.9 * x.double() - 0.1 * u.double(), x._version
    entries.apply_update(x, u, keep=0.9, step=0.1)
    torch.testing.assert_close(x.double(), expected, rtol=1e-6, atol=1e-7)
    assert x._version > version


def test_results_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            x = numbers(300_000)
            found.append((entries.sum_squares(x), entries.sum_roots(x)))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_only_plain_float32_on_the_host_in_one_order_is_served():
    x = torch.randn(8, 6)
    assert serves(x, torch.randn(8, 6))
    assert serves(x.mT, torch.randn(8, 6).mT)
    assert not serves(x, torch.randn(6, 8).mT)
    assert not serves(x, torch.randn(8, 6).double())
    assert not serves(x[:, :3])
    assert not serves(x.to("meta"))
    assert not serves(torch.randn(3, requires_grad=True))
    with torch._subclasses.FakeTensorMode() as mode:
        assert not serves(mode.from_tensor(x))
    assert torch.func.vmap(lambda row: torch.tensor(float(serves(row))).expand(1))(x).sum() == 0
