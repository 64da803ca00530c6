"""Directions over lists, in both forms, against formulas in float64."""

import math

import pytest
import torch

from spectrim.kernels import use
from spectrim.kernels.adam import adam_directions
from spectrim.kernels.ademamix import ademamix_directions
from spectrim.kernels.momentum import momentum_directions
from spectrim.kernels.rounding import HIGH, LOW, noise

EAGER = {
    "test_matrices_that_do_not_cover_a_tensor_are_refused",
    "test_the_noise_is_uniform_and_its_lanes_are_independent",
}
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
DTYPES += [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]


def copied(*lists):
    return [[tensor.clone() for tensor in tensors] for tensors in lists]


def close(actual, expected, dtype=torch.float32):
    """Equal to the rounding of a dtype, list by list."""
    rtol = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=rtol, atol=1e-6)


def shrunk(y, tau, shape):
    """ψ in float64, as arXiv 2605.27733 writes it."""
    if tau == 0:
        return torch.zeros_like(y)
    if shape == "hard":
        return y.clamp(-tau, tau)
    return y / (1 + (y / tau) ** 2) ** (1.0 if shape == "redescending" else 0.5)


def adam64(grads, exp_avgs, exp_avg_sqs, steps, beta1, beta2, eps):
    results = []
    for g, m, v, t in zip(grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        g, m, v, t = g.double(), m.double(), v.double(), t.item()
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        results.append((m, v, m / (1 - beta1**t) / (v.sqrt() / math.sqrt(1 - beta2**t) + eps)))
    return map(list, zip(*results, strict=True))


@pytest.mark.parametrize(("narrow", "state"), DTYPES)
@pytest.mark.parametrize(("betas", "found"), [((0.9, 0.999), None), ((0.0, 0.95), 0.0)])
def test_adam_is_its_formula(form, lists, narrow, state, found, betas):
    grads, exp_avgs, exp_avg_sqs = lists(narrow), lists(state), lists(state, positive=True)
    steps = [torch.tensor(float(t)) for t in (1, 1, 2, 10, 1000, 100_000, 10_000_000)]
    m, v, direction = adam64(grads, exp_avgs, exp_avg_sqs, steps, *betas, 1e-8)
    out = lists()
    flag = None if found is None else torch.tensor(found)
    adam_directions(grads, exp_avgs, exp_avg_sqs, steps, out, beta1=betas[0], beta2=betas[1], eps=1e-8, found=flag)
    close(out, direction)
    close(exp_avgs, m, state)
    close(exp_avg_sqs, v, state)


def test_the_first_steps_are_corrected_exactly(form, lists):
    for t in (1, 2, 3, 20, 400, 800, 5000):
        (grads,), (m,), (v,) = ([tensors[3]] for tensors in (lists(), lists(), lists(positive=True)))
        _, _, expected = adam64([grads], [m], [v], [torch.tensor(float(t))], 0.9, 0.999, 1e-8)
        out = [torch.empty_like(grads)]
        adam_directions([grads], [m], [v], [torch.tensor(float(t))], out, beta1=0.9, beta2=0.999, eps=1e-8)
        close(out, expected)


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("sign", [False, True])
def test_momentum_is_its_formula(form, lists, narrow, average, nesterov, sign):
    grads, buffers, out = lists(narrow), lists(), lists()
    expected, directions = [], []
    for g, m in zip(grads, buffers, strict=True):
        g, m = g.double(), m.double()
        m = 0.95 * m + (0.05 if average else 1.0) * g
        look = g + 0.95 * (m - g) if average else g + 0.95 * m
        expected.append(m)
        directions.append(look if nesterov else m)
    options = {"decay": 0.95, "average": average, "nesterov": nesterov, "sign": sign}
    momentum_directions(grads, buffers, out, **options, found=torch.tensor(0.0))
    close(buffers, expected)
    close(out, [d.sign() for d in directions] if sign else directions)


@pytest.mark.parametrize("warmup", [None, 1, 1000])
@pytest.mark.parametrize("betas", [(0.9, 0.999, 0.9999), (0.0, 0.99, 0.999), (0.9, 0.999, 1.0)])
def test_ademamix_is_its_formula(form, lists, warmup, betas):
    grads, fast, slow, second, out = lists(), lists(), lists(), lists(positive=True), lists()
    steps = [torch.tensor(float(t)) for t in (1, 1, 2, 10, 999, 1000, 100_000)]
    if warmup == 1000 and betas[2] == 1.0:
        steps = [torch.tensor(1000.0)] * 7
    expected = []
    for g, m, s, v, t in zip(grads, fast, slow, second, steps, strict=True):
        g, m, s, v, t = g.double(), m.double(), s.double(), v.double(), t.item()
        x = 1.0 if warmup is None else min(1.0, t / warmup)

        def life(beta):
            return math.log(0.5) / math.log(beta) - 1 if 0 < beta < 1 else (-1.0 if beta == 0 else math.inf)

        lives = [share * life(beta) for share, beta in ((1 - x, betas[0]), (x, betas[2])) if share > 0]
        beta3 = 0.5 ** (1 / abs(1 + sum(lives))) if 1 + sum(lives) != 0 else 0.0
        m, s = betas[0] * m + (1 - betas[0]) * g, beta3 * s + (1 - beta3) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        d = (m / (1 - betas[0] ** t) + 5 * x * s) / (v.sqrt() / math.sqrt(1 - betas[1] ** t) + 1e-8)
        expected.append((m, s, v, d))
    options = {"betas": betas, "alpha": 5.0, "eps": 1e-8, "warmup_steps": warmup}
    ademamix_directions(grads, fast, slow, second, steps, out, **options, found=torch.tensor(0.0))
    for actual, wanted in zip((fast, slow, second, out), zip(*expected, strict=True), strict=True):
        close(actual, wanted)


@pytest.mark.parametrize("shape", ["redescending", "monotone", "hard"])
@pytest.mark.parametrize("split", [False, True])
def test_gradients_are_shrunk_matrix_by_matrix(form, lists, shape, split):
    grads, exp_avgs, exp_avg_sqs = lists(), lists(), lists(positive=True)
    grads[3][0] = 1e30  # far beyond any τ: its square overflows
    runs = [(i, 0, g.numel()) for i, g in enumerate(grads)]
    if split:
        runs = [*runs[:6], (6, 40, 80), (6, 0, 40)]
    taus = torch.rand(len(runs)) + 0.1
    taus[4] = 0.0
    steps = [torch.tensor(3.0)] * len(grads)
    exact = [g.double() for g in grads]
    for (i, start, length), tau in zip(runs, taus.tolist(), strict=True):
        part = exact[i].view(-1)[start : start + length]
        part.copy_(shrunk(part, tau, shape))
    m, v, direction = adam64(exact, exp_avgs, exp_avg_sqs, steps, 0.9, 0.999, 1e-8)
    momenta = [0.9 * old.double() + g for old, g in zip(exp_avgs, exact, strict=True)]
    buffers, out, moved = copied(exp_avgs, lists(), lists())
    chosen = {"taus": taus, "runs": runs if split else None, "form": shape}
    adam_directions(grads, exp_avgs, exp_avg_sqs, steps, out, beta1=0.9, beta2=0.999, eps=1e-8, **chosen)
    momentum_directions(grads, buffers, moved, decay=0.9, **chosen)
    close(out, direction)
    close(exp_avgs, m)
    close(exp_avg_sqs, v)
    close(moved, momenta)


def all_directions(grads, states, steps, out, **options):
    """Each operation of directions on the same gradients; ``states``: six lists of buffers."""
    adam_directions(grads, *states[:2], steps, out, beta1=0.9, beta2=0.999, eps=1e-8, **options)
    if "found" in options:
        assert all(tensor.isfinite().all() for tensor in out)
    momentum_directions(grads, states[2], out, decay=0.9, nesterov=True, average=True, steps=steps, **options)
    if "found" in options:
        assert all(tensor.isfinite().all() for tensor in out)
    ademamix_directions(
        grads, *states[3:], steps, out, betas=(0.9, 0.999, 0.9999), alpha=5.0, eps=1e-8, warmup_steps=10, **options
    )


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
def test_a_skipped_step_changes_no_state_and_leaves_finite_directions(form, lists, state):
    grads, states, steps = lists(), [lists(state, positive=True) for _ in range(6)], [torch.tensor(0.0)] * 7
    grads[3][:] = math.nan
    grads[4][5] = math.inf
    before, out = copied(*states), lists()
    taus = torch.full((7,), math.nan)  # of the entries that were no numbers
    all_directions(grads, states, steps, out, found=torch.tensor(1.0), taus=taus, seeds=range(7))
    for old, new in zip(before, states, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(old, new, strict=True))
    assert all(tensor.isfinite().all() for tensor in out)


@pytest.mark.parametrize("seeds", [None, [0, 1, 2**40, 3, 2**63 - 1, 5, 6]])
def test_both_forms_round_states_in_bfloat16_to_the_same_bits(lists, seeds):
    grads, states = lists(torch.bfloat16), [lists(torch.bfloat16, positive=True) for _ in range(6)]
    steps, results = [torch.tensor(float(t)) for t in range(1, 8)], []
    for kernels in (False, True):
        new = copied(*states)
        with use(kernels):
            all_directions(grads, new, steps, lists(), seeds=seeds)
        results.append(torch.cat([tensor.view(-1) for tensors in new for tensor in tensors]))
    # A result on the edge between two numbers may fall on either side: the float32 before it differs in its last bit.
    differ = results[0] != results[1]
    assert differ.float().mean() < 1e-3
    torch.testing.assert_close(results[0], results[1], rtol=2**-7, atol=1e-6)


def test_rounding_by_chance_is_right_on_average_and_the_same_every_time(form):
    size = 2**16
    small = torch.full((size,), 2.0**-10)
    buffers = [torch.ones(size, dtype=torch.bfloat16) for _ in range(3)]
    out, one = [torch.empty(size) for _ in range(3)], torch.tensor(1.0)
    momentum_directions([small] * 3, buffers, out, decay=1.0, seeds=[4, 4, 5], steps=[one, one, one])
    # Of bfloat16 numbers 1 has a neighbour at 1 + 2^-7: an eighth of all must go there.
    for buffer in buffers:
        assert set(buffer.unique().tolist()) == {1.0, 1.0 + 2.0**-7}
        share = (buffer > 1).float().mean().item()
        assert abs(share - 1 / 8) < 5 * math.sqrt(7 / 64 / size)
    assert torch.equal(buffers[0], buffers[1])
    overlap = ((buffers[0] > 1) & (buffers[2] > 1)).float().mean().item()
    assert abs(overlap - 1 / 64) < 5 * math.sqrt(1 / 64 / size)
    again = [torch.ones(size, dtype=torch.bfloat16)]
    momentum_directions([small], again, out[:1], decay=1.0, seeds=[4], steps=[torch.tensor(2.0)])
    assert not torch.equal(again[0], buffers[0])
    nearest = [torch.ones(size, dtype=torch.bfloat16)]
    momentum_directions([small], nearest, out[:1], decay=1.0)
    assert (nearest[0] == 1).all()


def test_the_noise_is_uniform_and_its_lanes_are_independent():
    like = torch.empty(2**18)
    low, high = (noise(like, 7, torch.tensor(3.0), lane).double() / 2**16 for lane in (LOW, HIGH))
    for draw in (low, high):
        assert abs(draw.mean() - 0.5) < 5 / math.sqrt(12 * 2**18)
        assert abs(draw[1:].sub(0.5) @ draw[:-1].sub(0.5)) / 2**18 < 5 / 12 / 2**9
        counts = torch.histc(draw, 64, 0, 1)
        assert ((counts - 2**12) ** 2 / 2**12).sum() < 63 + 5 * math.sqrt(2 * 63)
    assert abs((low - 0.5) @ (high - 0.5)) / 2**18 < 5 / 12 / 2**9


def test_a_matrix_that_lies_transposed_is_walked_in_the_order_of_memory(form):
    grads, m, v = ([torch.rand(5, 9).mT.contiguous().mT.clone(memory_format=torch.preserve_format)] for _ in range(3))
    assert not grads[0].is_contiguous()
    out, steps = [torch.empty_like(grads[0])], [torch.tensor(1.0)]
    _, _, direction = adam64(grads, m, v, steps, 0.9, 0.999, 1e-8)
    adam_directions(grads, m, v, steps, out, beta1=0.9, beta2=0.999, eps=1e-8)
    close(out, direction)
    results = []
    for kernels in (False, True):
        narrow = [torch.ones(9, 5, dtype=torch.bfloat16).mT]
        with use(kernels):
            momentum_directions(grads, narrow, [torch.empty(9, 5).mT], decay=0.9, seeds=[1])
        results.append(narrow[0])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_matrices_that_do_not_cover_a_tensor_are_refused(form, lists):
    grads, buffers, out = lists(), lists(), lists()
    runs = [(i, 0, g.numel()) for i, g in enumerate(grads)]
    for wrong, said in (
        ([*runs[:6], (6, 0, 119)], "cover 119 of 120"),
        ([*runs[:6], (6, 0, 60), (6, 59, 61)], "overlaps the run before"),
        ([*runs[:6], (7, 0, 120)], "expected a part"),
    ):
        with pytest.raises(ValueError, match=said):
            momentum_directions(grads, buffers, out, decay=0.9, runs=wrong, taus=torch.ones(len(wrong)))
    with pytest.raises(ValueError, match="float32 vector of 7"):
        momentum_directions(grads, buffers, out, decay=0.9, taus=torch.ones(6))
