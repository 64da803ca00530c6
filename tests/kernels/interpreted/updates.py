"""Updates of weights and AdamW's step over lists, in both forms, against formulas in float64."""

import math

import pytest
import torch

from spectrim.kernels import use
from spectrim.kernels.adam import adamw_step
from spectrim.kernels.update import apply_updates

WEIGHTS = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float32: 2e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def close(actual, expected):
    """Equal to the rounding of their own dtype."""
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=4 * EPS[one.dtype] / 3, atol=1e-6)


def same(actual, expected):
    return all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("found", [None, 0.0, 1.0])
def test_every_weight_has_its_own_numbers(form, lists, dtype, found):
    weights, updates = lists(dtype), lists()
    tensor_lr = torch.tensor(0.03)
    lrs = [0.1, 0.2, tensor_lr, 0.3, tensor_lr, torch.tensor(0.5), 0.0]
    decays = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    runs = [(i, 0, w.numel()) for i, w in enumerate(weights[:6])] + [(6, 40, 80), (6, 0, 40)]
    scales = torch.rand(8)
    expected = [w.double() * (1 - float(lr) * decay) for w, lr, decay in zip(weights, lrs, decays, strict=True)]
    for (i, start, length), scale in zip(runs, scales, strict=True):
        change = float(lrs[i]) * scale.double() * updates[i].double().view(-1)[start : start + length]
        expected[i].view(-1)[start : start + length] -= change
    before = [w.clone() for w in weights]
    flag = None if found is None else torch.tensor(found)
    apply_updates(weights, updates, lr=lrs, weight_decay=decays, scale=scales, runs=runs, found=flag)
    if found:
        assert same(weights, before)
    else:
        close(weights, expected)


@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("update", [torch.float32, torch.float16])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
def test_one_number_serves_all_weights(form, lists, dtype, update, lr):
    weights, updates = lists(dtype), lists(update)
    expected = [w.double() * (1 - 0.01) - 0.2 * u.double() for w, u in zip(weights, updates, strict=True)]
    apply_updates(weights, updates, lr=lr, weight_decay=0.1, scale=2.0)
    close(weights, expected)


def test_lists_of_several_dtypes_are_taken_apart(form):
    weights = [torch.ones(5, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.float16)]
    updates = [torch.full((5,), float(i)) for i in range(4)]
    scales = torch.tensor([1.0, 2.0, 3.0, 4.0])
    apply_updates(weights, updates, lr=[0.5, 0.25, 0.5, 0.25], scale=scales)
    assert [w[0].item() for w in weights] == [1.0, 0.5, -2.0, -2.0]


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("shrinks", [False, True])
def test_adamw_is_its_formula(form, lists, narrow, dtype, shrinks):
    params, grads, m, v = lists(dtype), lists(narrow), lists(), lists(positive=True)
    steps = [torch.tensor(float(t)) for t in (1, 1, 2, 10, 100, 1000, 10_000)]
    taus = torch.rand(7) if shrinks else None
    lrs, decays = [0.1, torch.tensor(0.1), 0.2, 0.3, 0.1, 0.1, 0.1], [0.0, 0.1, 0.2, 0.3, 0.1, 0.1, 0.1]
    expected = []
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        g = g.double()
        if taus is not None:
            g = g / (1 + (g / taus[i].double()) ** 2)
        first, second, t = 0.9 * m[i].double() + 0.1 * g, 0.99 * v[i].double() + 0.01 * g**2, steps[i].item()
        d = first / (1 - 0.9**t) / (second.sqrt() / math.sqrt(1 - 0.99**t) + 1e-8)
        lr = float(lrs[i])
        expected.append((p.double() * (1 - lr * decays[i]) - lr * d, first, second))
    options = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "taus": taus, "found": torch.tensor(0.0)}
    adamw_step(params, grads, m, v, steps, lr=lrs, weight_decay=decays, **options)
    for actual, wanted in zip((params, m, v), zip(*expected, strict=True), strict=True):
        close(actual, wanted)


def test_weights_in_bfloat16_follow_torch_on_float32_copies_of_them(form):
    weights = [torch.randn(40, 40).bfloat16() for _ in range(2)]
    state = [[torch.zeros(40, 40) for _ in range(2)] for _ in range(2)]
    exact = [torch.nn.Parameter(w.float()) for w in weights]
    peer = torch.optim.AdamW(exact, lr=1e-2, weight_decay=0.1)
    for t in range(1, 4):
        grads = [torch.randn(40, 40).bfloat16() for _ in range(2)]
        for p, w, g in zip(exact, weights, grads, strict=True):
            p.data.copy_(w)
            p.grad = g.float()
        peer.step()
        steps = [torch.tensor(float(t))] * 2
        adamw_step(weights, grads, *state, steps, lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
        close(weights, [p.detach() for p in exact])


@pytest.mark.parametrize("dtype", WEIGHTS)
def test_a_skipped_step_of_adamw_changes_nothing(form, lists, dtype):
    params, grads, m, v = lists(dtype), lists(), lists(), lists(positive=True)
    grads[3][:] = math.nan
    before = [[tensor.clone() for tensor in tensors] for tensors in (params, m, v)]
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
    options = {"found": torch.tensor(1.0), "taus": torch.full((7,), math.nan), "seeds": list(range(7))}
    adamw_step(params, grads, m, v, [torch.tensor(0.0)] * 7, **numbers, **options)
    assert all(same(new, old) for new, old in zip((params, m, v), before, strict=True))


def test_both_forms_round_weights_to_the_same_bits(lists):
    params, updates, m, v = lists(torch.bfloat16), lists(), lists(), lists(positive=True)
    steps, seeds = [torch.tensor(3.0)] * 7, [0, 1, 2**40, 3, 2**63 - 1, 5, 6]
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
    results = []
    for kernels in (False, True):
        applied, stepped = ([w.clone() for w in params] for _ in range(2))
        with use(kernels):
            apply_updates(applied, updates, lr=0.01, weight_decay=0.1, seeds=seeds, steps=steps)
            moments = ([tensor.clone() for tensor in tensors] for tensors in (m, v))
            adamw_step(stepped, updates, *moments, steps, **numbers, seeds=seeds)
        results.append(torch.cat([w.view(-1) for w in (*applied, *stepped)]))
    # A result on the edge between two numbers may fall on either side: the float32 before it differs in its last bit.
    assert (results[0] != results[1]).float().mean() < 1e-3
    nearest = [w.clone() for w in params]
    apply_updates(nearest, updates, lr=0.01, weight_decay=0.1)
    assert (torch.cat([w.view(-1) for w in nearest]) != results[0][: results[0].numel() // 2]).any()


def test_small_updates_of_weights_in_bfloat16_are_kept_on_average(form):
    weights, updates = [torch.ones(2**14, dtype=torch.bfloat16)], [torch.full((2**14,), -1.0)]
    for t in range(1, 33):
        apply_updates(weights, updates, lr=2.0**-12, seeds=[9], steps=[torch.tensor(float(t))])
    assert abs(weights[0].double().mean().item() - (1 + 2**-7)) < 5 * 2**-7 / 2**7 / 2
    apply_updates(weights, updates, lr=2.0**-12)
    assert weights[0].double().mean().item() < 1 + 2**-7 + 2**-12


def test_what_is_not_finite_or_large_survives_rounding(form):
    values = torch.tensor([math.inf, -math.inf, math.nan, 3.4e38, -3.4e38, 1e-40, 0.0, -0.0])
    for seeds in (None, [3]):
        weights = [torch.zeros(8, dtype=torch.bfloat16)]
        apply_updates(weights, [-values], lr=1.0, seeds=seeds)
        assert weights[0][:2].tolist() == [math.inf, -math.inf]
        assert weights[0][2].isnan()
        assert (weights[0][3:5].abs() > 3.3e38).all()
        assert weights[0][5] <= 1.1e-40
        assert (weights[0][6:] == 0).all()
