"""Every recipe against its formulas in float64, over whole runs."""

import pytest
import torch
from torch import nn

import reference_optimizers as reference
import spectrim
from spectrim.operators.spike import start_basis
from spectrim.optim import Recipe, SpectralOptimizer
from spectrim.optim.directions import Average

LR = 1e-2
SHAPES = [(24, 40), (40, 24), (16, 16), (1, 12), (12, 1), (1, 1)]


def gradients(shape, steps=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    outer = torch.randn(shape[0], 1, generator=generator) * torch.randn(1, shape[-1], generator=generator)
    spike = outer if len(shape) == 2 else outer[0]
    return [torch.randn(shape, generator=generator) + 5 * spike for _ in range(steps)]


def run(optimizer_class, weight, grads, **options):
    parameter = nn.Parameter(weight.clone())
    optimizer = optimizer_class([parameter], **options)
    for grad in grads:
        parameter.grad = grad.to(parameter.dtype)
        optimizer.step()
    return parameter.detach()


def drift(actual, expected, start):
    """The error of what was added to the weight, relative to what should have been."""
    return ((actual.double() - expected).norm() / (expected - start.double()).norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pre", [None, 0.5], ids=["", "pre"])
@pytest.mark.parametrize("shrink", [None, 2.0], ids=["", "shrink"])
def test_adamw_with_clip_is_its_formula(shape, pre, shrink):
    weight, grads = torch.randn(shape), gradients(shape)
    actual = run(spectrim.AdamW, weight, grads, lr=LR, clip=0.7, pre_clip=pre, shrink=shrink)
    expected = reference.adamw(weight, grads, lr=LR, c=0.7, pre=pre, factor=shrink)
    assert drift(actual, expected, weight) < 1e-3


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (30,)])
def test_the_hard_form_cuts_off_at_the_threshold(shape, monkeypatch):
    monkeypatch.setattr(reference, "clip", reference.hard_clip)
    weight, grads = torch.randn(shape), gradients(shape)
    actual = run(spectrim.AdamW, weight, grads, lr=LR, clip=0.7, clip_form="hard", weight_decay=0.0)
    assert drift(actual, reference.adamw(weight, grads, lr=LR, c=0.7, decay=0.0), weight) < 1e-3


def test_a_vector_is_clipped_by_its_norm_and_not_decayed():
    weight, grads = torch.randn(30), gradients((30,))
    actual = run(spectrim.AdamW, weight, grads, lr=LR, clip=0.7, weight_decay=0.5)
    assert drift(actual, reference.adamw(weight, grads, lr=LR, c=0.7, decay=0.0), weight) < 3e-5  # float32


def test_auto_clip_is_a_hundredth_over_the_learning_rate():
    weight, grads = torch.randn(24, 40), gradients((24, 40))
    actual = run(spectrim.AdamW, weight, grads, lr=LR, clip="auto")
    assert torch.equal(actual, run(spectrim.AdamW, weight, grads, lr=LR, clip=0.01 / LR))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_with_everything_off_is_torch_adamw(dtype):
    ours, theirs = (nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30), nn.Linear(30, 5)).to(dtype) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizers = [spectrim.AdamW(ours.parameters(), lr=LR), torch.optim.AdamW(theirs.parameters(), lr=LR)]
    for step in range(50):
        batch = torch.randn(8, 20, generator=torch.Generator().manual_seed(step)).to(dtype)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["match_rms_adamw", "original"])
def test_muon_is_its_formula(shape, nesterov, scale):
    weight, grads = torch.randn(shape), gradients(shape)
    actual = run(spectrim.Muon, weight, grads, lr=LR, nesterov=nesterov, scale=scale)
    assert drift(actual, reference.muon(weight, grads, lr=LR, nesterov=nesterov, scale=scale), weight) < 2e-3


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (40, 40)])
@pytest.mark.parametrize("clip", [None, 0.5], ids=["", "clip"])
def test_spectra_is_its_formula(shape, clip):
    weight, grads = torch.randn(shape), gradients(shape)
    rank = round(0.05 * min(shape))
    actual = run(spectrim.Spectra, weight, grads, lr=LR, rank_ratio=0.05, clip=clip)
    start = start_basis(shape[1], rank, device=weight.device, dtype=torch.float64)
    assert drift(actual, reference.spectra(weight, grads, lr=LR, start=start, c=clip), weight) < 1e-3


def test_spectra_takes_as_many_power_steps_as_asked_for():
    weight, grads = torch.randn(60, 90), gradients((60, 90))
    start = start_basis(90, 3, device=weight.device, dtype=torch.float64)
    one, five = (reference.spectra(weight, grads, lr=LR, start=start, power_steps=steps) for steps in (1, 5))
    actual = run(spectrim.Spectra, weight, grads, lr=LR, rank_ratio=0.05, power_steps=5)
    assert drift(actual, five, weight) < 1e-3 < drift(one, five, weight)


@pytest.mark.parametrize("shape", [(24, 40), (30,)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_without_momentum_the_direction_is_the_gradient(shape, nesterov):
    weight, grads = torch.randn(shape), gradients(shape)
    options = {"lr": LR, "nesterov": nesterov, "weight_decay": 0.0, "momentum": 0.0}
    total = sum(grads[1:], grads[0])
    torch.testing.assert_close(run(spectrim.Momentum, weight, grads, **options), weight - LR * total)
    signs = sum((grad.sign() for grad in grads[1:]), grads[0].sign())
    torch.testing.assert_close(run(spectrim.Signum, weight, grads, **options), weight - LR * signs)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (30,)])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("clip", [None, 0.7], ids=["", "clip"])
def test_signum_and_momentum_are_their_formulas(shape, nesterov, clip):
    weight, grads = torch.randn(shape), gradients(shape)
    options = {"lr": LR, "nesterov": nesterov, "weight_decay": 0.0}
    for ours, formula in ((spectrim.Signum, reference.signum), (spectrim.Momentum, reference.momentum)):
        actual = run(ours, weight, grads, clip=clip, **options)
        expected = formula(weight, grads, lr=LR, nesterov=nesterov, decay=0.0, c=clip)
        assert drift(actual, expected, weight) < 1e-3


@pytest.mark.parametrize("warmup", [None, 4, 100])
@pytest.mark.parametrize("clip", [None, 0.7], ids=["", "clip"])
def test_ademamix_is_its_formula_with_both_warmups(warmup, clip):
    weight, grads = torch.randn(24, 40), gradients((24, 40))
    actual = run(spectrim.AdEMAMix, weight, grads, lr=LR, slow_warmup_steps=warmup, clip=clip)
    assert drift(actual, reference.ademamix(weight, grads, lr=LR, warmup=warmup, c=clip), weight) < 1e-3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-3, 1.0], ids=["below the bound", "above the bound"])
@pytest.mark.parametrize(("pre", "clip"), [(None, None), (None, 0.7), (0.5, 0.7)], ids=["", "clip", "pre+clip"])
def test_mars_is_its_formula(shape, size, pre, clip):
    weight, grads = torch.randn(shape), [size * grad for grad in gradients(shape)]
    actual = run(spectrim.MARS, weight, grads, lr=LR, gamma=0.3, pre_clip=pre, clip=clip)
    expected = reference.mars(weight, grads, lr=LR, gamma=0.3, pre=pre, c=clip)
    assert drift(actual, expected, weight) < (3e-5 if clip is None else 1e-3)


def test_vectors_of_mars_are_plain_adamws_with_betas_of_their_own():
    weight, grads = torch.randn(30), gradients((30,))
    actual = run(spectrim.MARS, weight, grads, lr=LR, betas=(0.8, 0.9), adamw_betas=(0.7, 0.95))
    expected = reference.adamw(weight, grads, lr=LR, betas=(0.7, 0.95), decay=0.0)
    assert drift(actual, expected, weight) < 3e-5  # float32


def test_shrinking_the_direction_instead_of_the_gradient():
    weight, grads = torch.randn(24, 40), gradients((24, 40), steps=1)
    actual = run(spectrim.Momentum, weight, grads, lr=LR, shrink=2.0, shrink_at="direction", shrink_form="redescending")
    expected = weight.double() - LR * reference.shrink(grads[0].double(), 2.0)
    assert drift(actual, expected, weight) < 1e-4


def test_bfloat16_momentum_keeps_what_rounding_to_nearest_would_lose():
    """Gradients of 1 % of half a unit in the last place each: nearest would stay at the first, stochastic follows."""
    parameter = nn.Parameter(torch.zeros(64, 64))
    optimizer = spectrim.Spectra([parameter], lr=1e-3, momentum=0.999, state_dtype="bfloat16")
    exact = torch.zeros(64, 64, dtype=torch.float64)
    for step in range(1000):
        parameter.grad = torch.full((64, 64), 1.0 if step == 0 else 2e-3) + 1e-4 * torch.randn(64, 64)
        exact = 0.999 * exact + parameter.grad.double()
        optimizer.step()
    kept = optimizer.state[parameter]["momentum_buffer"]
    assert kept.dtype == torch.bfloat16
    assert abs(kept.double().mean() / exact.mean() - 1) < 2e-3


def test_a_recipe_of_ones_own_takes_ten_lines():
    class ClippedAverage(SpectralOptimizer):
        recipe = Recipe(direction=Average)

        def __init__(self, params, lr=1e-3, momentum=0.95, weight_decay=0.1, *, clip="auto", **options):
            own = {"lr": lr, "momentum": momentum, "nesterov": False, "weight_decay": weight_decay, "clip": clip}
            super().__init__(params, own, options)

    weight, grads = torch.randn(24, 40), gradients((24, 40))
    actual = run(ClippedAverage, weight, grads, lr=LR, clip=0.1, weight_decay=0.0)
    expected = reference.momentum(weight, [0.05 * grad for grad in grads], lr=LR, c=0.1)
    assert drift(actual, expected, weight) < 1e-3


def test_spectra_keeps_momentum_and_basis_alone():
    parameter = nn.Parameter(torch.randn(768, 3072))
    spectra, adamw = spectrim.Spectra([parameter]), spectrim.AdamW([parameter])
    sizes = [sum(t.numel() for t in optimizer.state[parameter].values()) for optimizer in (spectra, adamw)]
    assert sizes[0] <= 0.51 * sizes[1]


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 5), (2, 4, 6)])
@pytest.mark.parametrize("optimizer_class", [spectrim.AdamW, spectrim.Spectra, spectrim.Muon])
def test_zero_gradients_move_nothing_but_by_decay(shape, optimizer_class):
    weight = torch.randn(shape)
    options = {"clip": 1.0} if optimizer_class is spectrim.AdamW else {}
    actual = run(optimizer_class, weight, [torch.zeros(shape)] * 3, lr=0.1, weight_decay=0.5, **options)
    torch.testing.assert_close(actual, weight * (1 - 0.05) ** 3)


@pytest.mark.parametrize("optimizer_class", [spectrim.AdamW, spectrim.Spectra, spectrim.Muon])
def test_a_stack_is_as_many_matrices(optimizer_class):
    options = {"clip": 0.7} if optimizer_class is spectrim.AdamW else {}
    weight, grads = (
        torch.randn(3, 24, 40),
        [torch.stack(gs) for gs in zip(*(gradients((24, 40), seed=i) for i in range(3)), strict=True)],
    )
    stacked = run(optimizer_class, weight, grads, lr=LR, **options)
    single = [run(optimizer_class, weight[i], [grad[i] for grad in grads], lr=LR, **options) for i in range(3)]
    torch.testing.assert_close(stacked, torch.stack(single), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer_class", [spectrim.AdamW, spectrim.Spectra, spectrim.Muon])
def test_bfloat16_weights_follow_float32_ones_to_their_own_rounding(optimizer_class):
    options = {"clip": 0.7} if optimizer_class is spectrim.AdamW else {}
    weight, grads = torch.randn(24, 40).bfloat16(), [grad.bfloat16() for grad in gradients((24, 40))]
    exact = run(optimizer_class, weight.float(), [grad.float() for grad in grads], lr=LR, **options)
    actual = run(optimizer_class, weight, grads, lr=LR, **options)
    assert actual.dtype == torch.bfloat16
    # Ten roundings of at most half a unit in the last of eight bits.
    assert ((actual.float() - exact).abs() <= 10 * 2**-8 * weight.float().abs().clamp_min(0.1)).all()
