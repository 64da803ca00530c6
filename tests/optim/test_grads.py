"""Gradient utilities against the singular value decomposition and the formulas, in float64."""

import math

import pytest
import torch
from torch import nn

import oracle
import reference_optimizers as reference
import spectrim
from spectra import SPECTRA, with_spectrum
from spectrim.optim.gradients.in_place import clip_grad_spectral_, shrink_grad_


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def with_gradient(grad, dtype=torch.float32):
    parameter = nn.Parameter(torch.zeros(grad.shape, dtype=dtype))
    parameter.grad = grad.to(dtype)
    return parameter


def heavy_tailed(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape).cauchy_(generator=generator).clamp(-1e4, 1e4)


def small_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 12), nn.Linear(12, 20), nn.LayerNorm(20), nn.Linear(20, 12))
    model(torch.arange(11)).square().sum().backward()
    return model


# -- Clipping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["soft", "hard"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (1, 12), (12, 1), (1, 1), (3, 24, 40)])
def test_gradients_are_clipped_as_the_singular_values_say(shape, form):
    parameter = with_gradient(torch.randn(shape))
    threshold = torch.full(shape[:-2], 0.7, dtype=torch.float64)
    expected = {"soft": oracle.soft_clip, "hard": oracle.hard_clip}[form](parameter.grad, threshold)
    clip_grad_spectral_(parameter, 0.7, form=form)
    assert oracle.relative_error(parameter.grad, expected) < 1e-3


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (5, 7), (1, 9)])
def test_norms_before_are_returned_from_below_within_two_percent(name, shape):
    norm = clip_grad_spectral_(with_gradient(3e4 * with_spectrum(name, *shape)), 0.1)
    assert 0.98 * 3e4 < norm.item() < 1.000001 * 3e4


def test_norms_come_in_order_for_parameters_that_have_a_gradient():
    parameters = [with_gradient(torch.eye(4) * 3), nn.Parameter(torch.ones(2, 2)), with_gradient(torch.ones(4))]
    norms = clip_grad_spectral_(parameters, 1.0)
    torch.testing.assert_close(norms, torch.tensor([3.0, 2.0]))


def test_vectors_are_left_alone_unless_asked_for():
    vector = with_gradient(torch.randn(30) * 5)
    before = vector.grad.clone()
    clip_grad_spectral_([vector], 0.5)
    assert torch.equal(vector.grad, before)
    clip_grad_spectral_([vector], 0.5, vectors=True)
    torch.testing.assert_close(vector.grad, reference.clip(before.double(), 0.5).float())
    vector.grad = before.clone()
    clip_grad_spectral_([vector], 0.5, vectors=True, form="hard")
    torch.testing.assert_close(vector.grad, before * 0.5 / before.norm())


@pytest.mark.parametrize(
    ("layout", "split", "view"),
    [
        ("transposed", None, lambda t: [t.mT]),
        ("matrix", (10, 20), lambda t: list(t.split((10, 20)))),
        ("transposed", (4, 8, 8), lambda t: list(t.mT.split((4, 8, 8)))),
    ],
)
def test_groups_say_how_a_gradient_is_read(layout, split, view):
    parameter = with_gradient(torch.randn(30, 20))
    expected = [oracle.soft_clip(part, 0.7) for part in view(parameter.grad)]
    before = [oracle.norm(part) for part in view(parameter.grad)]
    norms = clip_grad_spectral_([{"params": [parameter], "role": "matrix", "layout": layout, "split": split}], 0.7)
    for part, right in zip(view(parameter.grad), expected, strict=True):
        assert oracle.relative_error(part, right) < 1e-3
    assert norms.item() == pytest.approx(max(before).item(), rel=0.02)


def test_every_way_of_naming_parameters_does_the_same():
    results = []
    for choose in (
        lambda model: model,
        lambda model: model.parameters(),
        lambda model: model.named_parameters(),
        lambda model: spectrim.param_groups(model),
        lambda model: torch.optim.SGD(spectrim.param_groups(model), lr=0.1).param_groups,
    ):
        model = small_model()
        assert clip_grad_spectral_(choose(model), 0.1).shape == (7,)
        results.append([parameter.grad for parameter in model.parameters()])
    for other in results[1:]:
        for mine, its in zip(results[0], other, strict=True):
            assert torch.equal(mine, its)


def test_clipping_before_is_the_option_of_the_optimizer():
    model, twin = small_model(), small_model()
    before = spectrim.AdamW(spectrim.param_groups(model), lr=1e-2, clip=1.0)
    inside = spectrim.AdamW(spectrim.param_groups(twin), lr=1e-2, clip=1.0, pre_clip=0.2)
    clip_grad_spectral_(model, 0.2)
    before.step()
    inside.step()
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


# -- Shrinking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 40), (30,), (1, 1)])
@pytest.mark.parametrize("form", ["redescending", "monotone", "hard"])
def test_gradients_are_shrunk_as_the_formula_says(shape, form):
    parameter = with_gradient(heavy_tailed(shape))
    y = parameter.grad.double()
    scale = y.abs().sqrt().mean() ** 2 / (math.sqrt(2) * math.gamma(0.75) ** 2 / math.pi)
    tau = 2.0 * scale
    expected = {
        "redescending": y / (1 + (y / tau) ** 2),
        "monotone": y / (1 + (y / tau) ** 2).sqrt(),
        "hard": y.clamp(-tau, tau),
    }[form]
    scales, removed = shrink_grad_(parameter, 2.0, form=form)
    torch.testing.assert_close(parameter.grad, expected.float(), rtol=1e-5, atol=1e-6)
    assert scales.item() == pytest.approx(scale.item(), rel=1e-5)
    assert removed.item() == pytest.approx(1 - (expected.norm() / y.norm()).item() ** 2, abs=1e-5)


def test_the_automatic_factor_is_the_one_of_the_optimizer():
    model, twin = small_model(), small_model()
    before = spectrim.AdamW(spectrim.param_groups(model), lr=1e-2)
    inside = spectrim.AdamW(spectrim.param_groups(twin), lr=1e-2, shrink="auto")
    shrink_grad_(spectrim.param_groups(model))
    before.step()
    inside.step()
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


def test_embeddings_and_heads_are_not_shrunk():
    model = small_model()
    groups = spectrim.param_groups(model, overrides={"3.weight": {"role": "head"}})
    before = [parameter.grad.clone() for parameter in model.parameters()]
    found = shrink_grad_(groups, 0.1)
    kept = {
        name
        for (name, parameter), grad in zip(model.named_parameters(), before, strict=True)
        if torch.equal(parameter.grad, grad)
    }
    assert kept == {"0.weight", "3.weight"}
    assert int((found.removed == 0).sum()) == 2


@pytest.mark.parametrize("split", [None, (4, 8)])
def test_every_matrix_has_its_own_scale(split):
    small, large = torch.randn(4, 6), torch.randn(8, 6) * 1e3
    whole = with_gradient(torch.cat([small, large]))
    group = {"params": [whole], "role": "matrix", "layout": "matrix", "split": split}
    shrink_grad_([group], 2.0)
    if split is None:
        assert not torch.allclose(whole.grad[:4], reference.shrink(small.double(), 2.0).float(), rtol=1e-3)
    else:
        torch.testing.assert_close(whole.grad[:4], reference.shrink(small.double(), 2.0).float())
        torch.testing.assert_close(whole.grad[4:], reference.shrink(large.double(), 2.0).float())


# -- Each --------------------------------------------------------------------------------------------------------------

EACH = pytest.mark.parametrize(
    "apply",
    [
        lambda parameters, **options: clip_grad_spectral_(parameters, 0.5, vectors=True, **options),
        lambda parameters, **options: clip_grad_spectral_(parameters, 0.5, vectors=True, form="hard", **options),
        lambda parameters, **options: shrink_grad_(parameters, 0.5, **options).removed,
    ],
    ids=["clip", "clip hard", "shrink"],
)


@EACH
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_gradient_is_left_as_it_is_and_the_others_are_not(apply, bad):
    good, broken = with_gradient(torch.randn(6, 5)), with_gradient(torch.randn(6, 5))
    broken.grad[2, 3] = bad
    twin, before = with_gradient(good.grad.clone()), broken.grad.clone()
    apply([broken, good])
    apply([twin])
    torch.testing.assert_close(broken.grad, before, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(good.grad, twin.grad)


@EACH
def test_raising_names_the_parameter_and_changes_nothing(apply):
    good, broken = with_gradient(torch.randn(6, 5)), with_gradient(torch.full((6, 5), math.inf))
    before = good.grad.clone()
    with pytest.raises(RuntimeError, match=r"'second' is not finite"):
        apply([("first", good), ("second", broken)], error_if_nonfinite=True)
    assert torch.equal(good.grad, before)


def test_the_norm_of_a_non_finite_gradient_is_infinite():
    assert clip_grad_spectral_([with_gradient(torch.full((3, 3), math.nan))], 1.0).tolist() == [math.inf]


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_are_computed_in_float32(apply, dtype):
    narrow = with_gradient(torch.randn(24, 40), dtype)
    wide = with_gradient(narrow.grad.float())
    apply([narrow])
    apply([wide])
    assert narrow.grad.dtype == dtype
    assert torch.equal(narrow.grad, wide.grad.to(dtype))


@EACH
def test_zero_empty_and_missing_gradients_are_served(apply):
    parameters = [with_gradient(torch.zeros(3, 4)), with_gradient(torch.zeros(0, 4)), nn.Parameter(torch.ones(2))]
    assert apply(parameters).tolist() == [0.0, 0.0]
    assert not parameters[0].grad.any()
    assert apply([nn.Parameter(torch.ones(2))]).tolist() == []


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_bad_values_are_named(value):
    parameter = with_gradient(torch.ones(2, 2))
    with pytest.raises(ValueError, match=f"threshold={value}"):
        clip_grad_spectral_(parameter, value)
    with pytest.raises(ValueError, match=f"factor={value}"):
        shrink_grad_(parameter, value)
    with pytest.raises(ValueError, match=r"form='gentle': expected one of 'soft', 'hard'"):
        clip_grad_spectral_(parameter, 1.0, form="gentle")
    with pytest.raises(ValueError, match=r"form='gentle'"):
        shrink_grad_(parameter, form="gentle")
