"""Soft clipping against the singular value decomposition in float64."""

import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import oracle
import spectra
from spectrim.operators import hard_clip, orthogonalize, soft_clip, soft_clip_vector

thresholds = st.floats(-2, 2).map(lambda exponent: 10.0**exponent)
quick = settings(max_examples=60, deadline=None)


@quick
@given(spectra.matrices(), thresholds)
def test_soft_clip_matches_the_singular_value_decomposition_and_stays_below_the_threshold(X, c):
    ratio = oracle.norm(X).amax().item() / c
    c = c * max(1.0, ratio / 1e4)  # claimed up to σ₁/c = 1e4
    clipped = soft_clip(X, c)
    assert oracle.relative_error(clipped, oracle.soft_clip(X, c)) < 1e-3
    assert (oracle.norm(clipped) <= c * (1 + 1e-5)).all()


@quick
@given(spectra.matrices(), thresholds)
def test_soft_clip_is_odd_and_commutes_with_transposition(X, c):
    clipped = soft_clip(X, c)
    torch.testing.assert_close(soft_clip(-X, c), -clipped, rtol=0, atol=0)
    size = clipped.abs().max().item()
    torch.testing.assert_close(soft_clip(X.mT, c).mT, clipped, rtol=0, atol=2e-3 * size)


@pytest.mark.parametrize("ratio", [1e-3, 1.0, 20.0, 200.0, 1e3])
@pytest.mark.parametrize("spectrum", spectra.SPECTRA)
@pytest.mark.parametrize("shape", [(160, 160), (96, 240), (240, 96), (1, 1), (1, 90)])
@pytest.mark.parametrize("solver", ["reference", "rational", "minimax"])
def test_soft_clip_is_accurate_for_every_spectrum(shape, spectrum, ratio, solver):
    X = spectra.with_spectrum(spectrum, *shape).float()
    clipped = soft_clip(X, 1 / ratio, solver=solver)
    assert oracle.relative_error(clipped, oracle.soft_clip(X, 1 / ratio)) < 1e-3
    assert oracle.norm(clipped) <= (1 + 1e-5) / ratio


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float64, 1e-3)])
def test_soft_clip_keeps_the_dtype_and_never_writes_to_its_argument(dtype, error):
    X = (spectra.with_spectrum("ten spikes", 64, 96) * 100).to(dtype)
    before = X.clone()
    clipped = soft_clip(X, 1.5)
    assert clipped.dtype == dtype
    assert torch.equal(X, before)
    assert clipped.data_ptr() != X.data_ptr()
    assert oracle.relative_error(clipped, oracle.soft_clip(X, 1.5)) < error
    assert oracle.norm(clipped) <= 1.5 * (1 + error)


@pytest.mark.parametrize("solver", ["auto", "rational", "minimax"])
@pytest.mark.parametrize("shape", [(40, 56), (120, 90)])
def test_soft_clip_treats_every_matrix_of_a_stack_by_itself(shape, solver):
    names = list(spectra.SPECTRA)
    X = torch.stack([spectra.with_spectrum(name, *shape) * 10.0 ** (2 * i - 7) for i, name in enumerate(names)]).float()
    c = torch.logspace(-1, 1, len(names))
    assert oracle.relative_error(soft_clip(X, c, solver=solver), oracle.soft_clip(X, c)) < 1e-3
    nested = X.view(2, 3, *shape)
    clipped = soft_clip(nested, torch.tensor(5.0), solver=solver)
    assert oracle.relative_error(clipped, oracle.soft_clip(nested, 5.0)) < 1e-3
    assert (oracle.norm(clipped) <= 5.0 * (1 + 1e-5)).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 9), (2, 9, 5), (0, 3), (2, 0, 4)])
def test_soft_clip_of_zero_is_zero(shape):
    assert torch.equal(soft_clip(torch.zeros(shape), 2.0), torch.zeros(shape))


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e15, 1e30, 3e38])
@pytest.mark.parametrize("c", [1e-6, 1.0, 1e6])
def test_soft_clip_of_finite_entries_is_finite(size, c):
    X = spectra.with_spectrum("geometric", 12, 20)
    clipped = soft_clip((X / X.abs().max() * size).float(), c)
    assert clipped.isfinite().all()
    assert oracle.norm(clipped) <= c * (1 + 1e-5)


def test_the_newton_schulz_of_the_paper_is_accurate_where_little_is_clipped_and_only_there():
    X = spectra.with_spectrum("geometric", 48, 64).float()
    exact = oracle.soft_clip(X, 0.5)
    assert oracle.relative_error(soft_clip(X, 0.5, solver="newton_schulz"), exact) < 1e-4
    exact = oracle.soft_clip(X, 1e-3)
    assert oracle.relative_error(soft_clip(X, 1e-3, solver="newton_schulz"), exact) > 0.05


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan"), float("inf")])
def test_a_threshold_that_is_not_positive_is_named(threshold):
    with pytest.raises(ValueError, match=f"threshold={threshold}: expected a positive"):
        soft_clip(torch.ones(2, 3), threshold)


def test_bad_arguments_are_named_with_what_is_allowed():
    with pytest.raises(ValueError, match=r"shape \(3,\): expected a matrix"):
        soft_clip(torch.ones(3), 1.0)
    with pytest.raises(ValueError, match=r"dtype torch\.int64"):
        soft_clip(torch.ones(3, 3, dtype=torch.int64), 1.0)
    with pytest.raises(ValueError, match=r"solver='svd': expected one of 'auto'"):
        soft_clip(torch.ones(3, 3), 1.0, solver="svd")
    with pytest.raises(ValueError, match=r"threshold has shape \(3,\)"):
        soft_clip(torch.ones(2, 3, 3), torch.ones(3))
    for tol in (0, -1.0, 1e-11, float("nan")):
        for clip in (soft_clip, hard_clip):
            with pytest.raises(ValueError, match=f"tol={tol}.*expected 1e-10 or more"):
                clip(torch.ones(3, 3), 1.0, tol=tol)
    with pytest.raises(ValueError, match=r"precision='double': expected one of 'auto', 'exact', 'half'"):
        soft_clip(torch.ones(3, 3), 1.0, precision="double")


def test_an_accuracy_that_is_not_kept_is_refused():
    X = torch.ones(3, 3)
    with pytest.raises(ValueError, match=r"tol=0\.1 with solver='newton_schulz': expected no tol"):
        soft_clip(X, 1.0, solver="newton_schulz", tol=0.1)
    with pytest.raises(ValueError, match=r"tol=0\.001 with precision='half': expected 0\.01 or more"):
        soft_clip(X, 1.0, precision="half", tol=1e-3)
    with pytest.raises(ValueError, match="solver='minimax' with precision='half'"):
        soft_clip(X, 1.0, precision="half", solver="minimax")


@pytest.fixture
def half_calls(monkeypatch):
    """What is asked of the half-precision operators, which here give back what they get."""
    calls = []

    def half_clip(stacks, thresholds, *, overwrite=False):
        calls.append((*stacks, *thresholds, overwrite))
        return stacks

    def half_polar(stacks, *, steps=None, overwrite=False):
        calls.append((*stacks, steps, overwrite))
        return stacks

    stand_in = types.SimpleNamespace(half_clip=half_clip, half_polar=half_polar)
    monkeypatch.setitem(sys.modules, "spectrim.operators.half", stand_in)
    return calls


def test_half_precision_is_given_float32_stacks_and_one_threshold_for_each_matrix(half_calls):
    X = torch.randn(2, 3, 5, 4, dtype=torch.bfloat16)
    c = torch.rand(3)
    assert torch.equal(soft_clip(X, c, precision="half"), X)
    assert torch.equal(soft_clip(X.float()[0, 0], 2.0, precision="half", tol=0.05), X.float()[0, 0])
    assert torch.equal(orthogonalize(X.double(), precision="half", steps=5), X.double())
    (stack, thresholds, overwrite), (single, one, keep), (polar, steps, _) = half_calls
    assert torch.equal(stack, X.float().view(6, 5, 4))
    assert torch.equal(thresholds, c.repeat(2))
    assert overwrite
    assert not keep
    assert (single.shape, one.tolist()) == ((1, 5, 4), [2.0])
    assert (polar.dtype, polar.shape, steps) == (torch.float32, (6, 5, 4), 5)


def test_half_precision_is_what_auto_means_on_cuda_unless_more_was_asked_for(half_calls, monkeypatch):
    for module, name in (
        ("clip", "solve"),
        ("orthogonalize", "minimax_polar"),
        ("orthogonalize", "map_singular_values"),
    ):
        monkeypatch.setattr(sys.modules[f"spectrim.operators.{module}"], name, lambda X, *_, **__: X)

    def halves(operator, *arguments, **options):
        half_calls.clear()
        operator(*arguments, **options)
        return bool(half_calls)

    with FakeTensorMode():
        X = torch.empty(3, 70, 90, device="cuda")
        for operator, arguments in ((soft_clip, (1.0,)), (orthogonalize, ())):
            assert halves(operator, X, *arguments)
            assert halves(operator, X.bfloat16(), *arguments)
            assert not halves(operator, X, *arguments, precision="exact")
            assert not halves(operator, X, *arguments, solver="minimax")
            assert not halves(operator, torch.empty(3, 70, 90, device="cuda", dtype=torch.float64), *arguments)
            assert not halves(operator, torch.empty(3, 70, 90), *arguments)
        assert not halves(soft_clip, X, 1.0, tol=1e-3)
        assert halves(soft_clip, X, 1.0, tol=1e-2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("solver", ["reference", "rational", "minimax"])
def test_what_is_not_finite_becomes_nan_by_itself(solver, value):
    X = torch.randn(3, 70, 90)
    X[1, 3, 5] = value
    clipped = soft_clip(X, torch.tensor([1.0, 2.0, 3.0]), solver=solver)
    assert clipped[1].isnan().all()
    for i in (0, 2):
        assert oracle.relative_error(clipped[i], oracle.soft_clip(X[i], i + 1.0)) < 1e-3
    assert soft_clip(X[1], 1.0, solver=solver).isnan().all()


@pytest.mark.parametrize("solver", ["reference", "rational", "minimax"])
def test_a_threshold_out_of_the_range_of_the_dtype_changes_nothing_or_leaves_nothing(solver):
    X = torch.randn(70, 90)
    for c in (1e50, torch.tensor(1e50, dtype=torch.float64)):
        torch.testing.assert_close(soft_clip(X, c, solver=solver), X, rtol=1e-3, atol=0)
        assert torch.equal(soft_clip(torch.zeros(70, 90), c, solver=solver), torch.zeros(70, 90))
    for c in (1e-60, torch.tensor(1e-60, dtype=torch.float64)):
        assert torch.equal(soft_clip(X, c, solver=solver), torch.zeros(70, 90))
        assert torch.equal(soft_clip(torch.zeros(70, 90), c, solver=solver), torch.zeros(70, 90))


@quick
@given(spectra.matrices(stack=False), thresholds)
def test_the_vector_form_is_the_soft_clip_of_one_row(X, c):
    expected = torch.stack([oracle.soft_clip(row[None], c)[0] for row in X])
    assert oracle.relative_error(soft_clip_vector(X, c), expected) < 1e-6


def test_the_vector_form_keeps_the_dtype_and_survives_large_entries():
    assert soft_clip_vector(torch.ones(3, dtype=torch.bfloat16), 1.0).dtype == torch.bfloat16
    torch.testing.assert_close(soft_clip_vector(torch.full((4,), 1e30), torch.tensor(2.0)), torch.full((4,), 1.0))
    assert torch.equal(soft_clip_vector(torch.zeros(3), 1.0), torch.zeros(3))
    huge = torch.tensor([1e300, -1e300], dtype=torch.float64)
    torch.testing.assert_close(soft_clip_vector(huge, 1e299), huge.sign() * 1e299 / (2 + 0.01) ** 0.5)
    tiny = torch.tensor([1e-45, 3e-45])
    assert torch.equal(soft_clip_vector(tiny, 1.0), tiny)


@pytest.mark.parametrize("ratio", [1e-3, 1.0, 30.0, 1e3])
@pytest.mark.parametrize("spectrum", spectra.SPECTRA)
@pytest.mark.parametrize("shape", [(96, 96), (40, 100), (100, 40)])
def test_hard_clip_is_accurate_for_every_spectrum(shape, spectrum, ratio):
    X = spectra.with_spectrum(spectrum, *shape).float()
    clipped = hard_clip(X, 1 / ratio)
    assert oracle.relative_error(clipped, oracle.hard_clip(X, 1 / ratio)) < 1e-3
    assert oracle.norm(clipped) <= (1 + 1e-3) / ratio


def test_hard_clip_is_accurate_where_many_singular_values_are_near_the_threshold():
    X = spectra.matrix(80, 120, 1 + 1e-3 * torch.linspace(-1, 1, 80)).float()
    assert oracle.relative_error(hard_clip(X, 1.0), oracle.hard_clip(X, 1.0)) < 1e-6
    spiky = spectra.matrix(80, 120, torch.cat([torch.full((5,), 1e3), 1 + 1e-3 * torch.linspace(-1, 1, 75)])).float()
    assert oracle.relative_error(hard_clip(spiky, 1.0), oracle.hard_clip(spiky, 1.0)) < 1e-4


def test_hard_clip_of_zero_is_zero_and_the_rest_of_a_stack_is_not_touched_by_a_matrix_that_is_not_finite():
    X = torch.stack(
        [torch.zeros(70, 90), spectra.with_spectrum("flat", 70, 90).float(), torch.full((70, 90), torch.nan)]
    )
    for clip in (hard_clip, soft_clip):
        clipped = clip(X, 0.5)
        assert torch.equal(clipped[0], X[0])
        torch.testing.assert_close(clipped[1], clip(X[1], 0.5), rtol=1e-3, atol=1e-3)
        assert clipped[2].isnan().all()


@pytest.mark.parametrize("shape", [(128, 160), (200, 200), (400, 80)])
def test_every_solver_handles_what_training_produces(shape, recorded):
    for name, X in recorded(shape):
        for c in (0.02 * oracle.norm(X).item(), 0.2 * oracle.norm(X).item()):
            exact = oracle.soft_clip(X, c)
            for solver in ("auto", "minimax"):
                clipped = soft_clip(X, c, solver=solver)
                assert oracle.relative_error(clipped, exact) < 1e-3, name
                assert oracle.norm(clipped) <= c * (1 + 1e-3), name
            half = soft_clip(X.bfloat16(), c)
            assert oracle.relative_error(half, oracle.soft_clip(X.bfloat16(), c)) < 1e-2, name
            assert oracle.norm(half) <= c * (1 + 1e-2), name


@pytest.mark.parametrize("solver", ["auto", "rational", "reference", "minimax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tol", [10.0, 0.1, 1e-2, 1e-5, 1e-6, 1e-10])
def test_every_tolerance_is_met(solver, dtype, tol):
    for spectrum in ("ten spikes", "geometric"):
        X = spectra.with_spectrum(spectrum, 128, 160).to(dtype)
        for ratio in (1.0, 30.0, 1e3):
            rounding = torch.finfo(dtype).eps
            clipped, exact = soft_clip(X, 1 / ratio, tol=tol, solver=solver), oracle.soft_clip(X, 1 / ratio)
            assert oracle.relative_error(clipped, exact) < tol + rounding
            assert oracle.norm(clipped) <= (1 + 1e-5) / ratio


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_on_an_accelerator_every_product_is_a_true_one_and_nothing_comes_from_the_host(dtype):
    seen = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            seen.append(
                (func._schema.name, torch.backends.cuda.matmul.fp32_precision, {x.device.type for x in tensors})
            )
            return func(*args, **kwargs or {})

    X = torch.empty(3, 70, 90, device="meta", dtype=dtype)
    torch.set_float32_matmul_precision("medium")
    try:
        with Watched():
            soft_clip(X, 1.0, precision="exact")
            soft_clip(X, torch.ones(3, device="meta"), precision="exact")
            soft_clip(X, 1.0, solver="newton_schulz")
            orthogonalize(X, precision="exact")
            orthogonalize(X, steps=5, precision="exact")
            hard_clip(X, 1.0)
    finally:
        torch.set_float32_matmul_precision("highest")
    products = [precision for name, precision, _ in seen if name.endswith("mm") and "linalg" not in name]
    assert len(products) > 50
    if dtype != torch.float64:
        single = [p for name, p, _ in seen if name in ("aten::bmm", "aten::baddbmm")][:20]
        assert set(single) == {"ieee"}
    assert all(devices <= {"meta"} for _, _, devices in seen)
    assert not {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero"} & {name for name, _, _ in seen}


def test_soft_clip_compiles_whole_and_does_not_recompile_for_another_matrix_or_threshold():
    X = torch.stack([spectra.with_spectrum(name, 70, 90) for name in ("ten spikes", "flat")]).float()
    compiled = torch.compile(soft_clip, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for scale, threshold in ((1.0, torch.tensor([0.05, 1.0])), (30.0, torch.tensor([0.1, 3.0]))):
            exact = oracle.soft_clip(X * scale, threshold)
            assert oracle.relative_error(compiled(X * scale, threshold), exact) < 1e-3


@pytest.mark.parametrize("dynamic", [None, True])
def test_soft_clip_compiles_whole_for_one_shape_after_another(dynamic):
    compiled = torch.compile(soft_clip, fullgraph=True, backend="eager", dynamic=dynamic)
    for shape in ((70, 90), (80, 100), (66, 120)):
        X = spectra.with_spectrum("ten spikes", *shape).float()
        assert oracle.relative_error(compiled(X, 0.05), oracle.soft_clip(X, 0.05)) < 1e-3


def test_soft_clip_works_on_fake_and_meta_tensors():
    with FakeTensorMode():
        assert soft_clip(torch.empty(3, 200, 100), 1.0).shape == (3, 200, 100)
    assert soft_clip(torch.empty(200, 100, device="meta", dtype=torch.bfloat16), 1.0).dtype == torch.bfloat16
