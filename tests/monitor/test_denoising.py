"""What operators leave of planted gradients, against closed forms and the operators themselves."""

import pytest
import torch

from planted import basis, gaussian, low_rank
from spectrim.monitor.denoising import OPERATORS, remains, remains_at
from spectrim.operators import hard_clip, smooth_shrink, soft_clip

M, N, BATCHES = 24, 40, 24
U, V = basis(M, M, seed=1), basis(N, M, seed=2)


def spiked_noise(strength: float) -> torch.Tensor:
    """The published model: a flat mean below the threshold, and noise of rank one in fresh directions, far above it."""
    mean = low_rank(U, V, [1.0] * M)
    left = torch.nn.functional.normalize(gaussian(BATCHES, M, 1, seed=3), dim=1)
    right = torch.nn.functional.normalize(gaussian(BATCHES, 1, N, seed=4), dim=2)
    signs = torch.sign(gaussian(BATCHES, 1, 1, seed=5))
    return mean + strength * signs * left * right


def test_every_operator_leaves_the_energy_that_was_asked_for() -> None:
    stack = spiked_noise(5.0)
    for found in remains(stack, energies=(0.7, 0.2)):
        assert min(abs(found.energy - wanted) for wanted in (0.7, 0.2)) < 0.02, found


def test_what_is_left_is_what_the_operators_leave() -> None:
    stack = spiked_noise(20.0)
    maps = {
        "soft clip": lambda g: soft_clip(g, 2.0, tol=1e-9),
        "hard clip": lambda g: hard_clip(g, 2.0),
        "shrink": lambda g: smooth_shrink(g, 2.0),
        "clamp": lambda g: g.clamp(-2.0, 2.0),
        "norm": lambda g: g * min(1.0, 2.0 / float(g.norm())),
    }
    assert tuple(maps) == OPERATORS
    for operator, apply in maps.items():
        left = torch.stack([apply(gradient) for gradient in stack])
        found = remains_at(stack, operator, 2.0)  # type: ignore[arg-type]
        assert found.energy == pytest.approx(float(left.square().sum() / stack.square().sum()), rel=1e-6)
        assert found.noise == pytest.approx(float(left.var(0).sum() / stack.var(0).sum()), rel=1e-6)
        pairs = sum(
            float((left[k] * stack[other]).sum()) for k in range(BATCHES) for other in range(BATCHES) if k != other
        )
        whole = sum(
            float((stack[k] * stack[other]).sum()) for k in range(BATCHES) for other in range(BATCHES) if k != other
        )
        assert found.signal.value == pytest.approx(pairs / whole, rel=1e-6)


def test_bounding_a_constant_norm_is_scaling_and_has_no_gain() -> None:
    noise = gaussian(BATCHES, M, N, seed=0)
    stack = 5 * (noise / noise.norm(dim=(1, 2), keepdim=True)) + low_rank(U, V, [1e-3])
    found = remains_at(stack + low_rank(U, V, [1.0]), "norm", 1e-3)
    assert found.gain == pytest.approx(1, abs=0.15)


def test_spectral_clipping_beats_scaling_on_the_published_noise() -> None:
    found = {each.operator: each for each in remains(spiked_noise(40.0), energies=(0.05,))}
    assert found["hard clip"].signal.value > 1 / 3
    assert found["hard clip"].gain > 3
    assert found["soft clip"].gain > 3
    assert found["norm"].gain == pytest.approx(1, abs=0.05)


def test_shrinking_entries_beats_scaling_where_noise_sits_on_entries() -> None:
    stack = gaussian(1, M, N, seed=8) + 0.1 * gaussian(BATCHES, M, N, seed=9)
    struck = torch.rand(BATCHES, M, N, generator=torch.Generator().manual_seed(1)) < 0.02
    stack = stack + 50 * struck * torch.sign(gaussian(BATCHES, M, N, seed=10))
    best = dict.fromkeys(OPERATORS, 0.0)
    for each in remains(stack, energies=(0.2, 0.05)):
        best[each.operator] = max(best[each.operator], each.gain)
    assert best["shrink"] > 3
    assert best["clamp"] > 3
    assert best["norm"] < 1.1


def test_on_white_noise_nothing_beats_scaling() -> None:
    stack = low_rank(U, V, [3.0, 2.0]) + 0.3 * gaussian(BATCHES, M, N, seed=6)
    assert max(each.gain for each in remains(stack)) < 1.02


def test_the_error_of_the_signal_is_its_spread_over_repetitions() -> None:
    mean = low_rank(U, V, [3.0, 2.0, 1.0])
    found = [remains_at(mean + gaussian(16, M, N, seed=seed), "clamp", 0.5).signal for seed in range(30)]
    values, errors = torch.tensor(found).T
    assert float(errors.mean()) == pytest.approx(float(values.std()), rel=0.4)


def test_bad_strengths_and_shares_are_refused() -> None:
    stack = gaussian(4, 3, 3, seed=0)
    with pytest.raises(ValueError, match="strength=0"):
        remains_at(stack, "clamp", 0)
    with pytest.raises(ValueError, match=r"operator='squash'.*'soft clip'"):
        remains_at(stack, "squash", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"energies=\(1\.5,\)"):
        remains(stack, energies=(1.5,))
    with pytest.raises(ValueError, match="all zero"):
        remains(torch.zeros(4, 3, 3))
