"""AdEMAMix over lists in Triton."""

import math

import triton
import triton.language as tl
from torch import Tensor

from ..costs import entrywise_cost
from ..table import upload
from .adam import log_of
from .common import entries, mean_of, minus_expm1, noise, pointer, put, shrink, work_of
from .operators import addresses, form_number, launches_of, operator

__all__ = ["ademamix_directions"]


@triton.jit
def _ademamix(
    g_at, m_at, s_at, v_at, out_at, offsets, left, random, other, tau,
    rest1, slow, beta2, rest2, first, second, share, eps,
    FORM: tl.constexpr, CHANCE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    g = shrink(entries(g_at, offsets, left, MASKED), tau, FORM)
    m = entries(m_at, offsets, left, MASKED)
    s = entries(s_at, offsets, left, MASKED)
    v = entries(v_at, offsets, left, MASKED)
    m = mean_of(m, g, rest1)
    s = mean_of(s, g, slow)
    v = beta2 * v + rest2 * g * g
    put(m_at, offsets, left, m, random, CHANCE, MASKED)
    put(s_at, offsets, left, s, other, CHANCE, MASKED)
    put(v_at, offsets, left, v, random >> 16, CHANCE, MASKED)
    d = (m * first + share * s) / (tl.sqrt_rn(v) * second + eps)
    put(out_at, offsets, left, d, random, False, MASKED)


@triton.jit(do_not_specialize=["count"])
def _kernel(
    table, blocks, count, found, taus, rest1, beta2, rest2, log1, log2, half_life1, half_life3, alpha, warmup, eps,
    GRAD: tl.constexpr, FAST: tl.constexpr, SLOW: tl.constexpr, SECOND: tl.constexpr, OUT: tl.constexpr,
    FORM: tl.constexpr, CHANCE: tl.constexpr, FOUND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, matrix, begin, left = work_of(blocks, ALIGNED)
    g_at = pointer(table, tensor, begin, GRAD, ALIGNED)
    m_at = pointer(table, count + tensor, begin, FAST, ALIGNED)
    s_at = pointer(table, 2 * count + tensor, begin, SLOW, ALIGNED)
    v_at = pointer(table, 3 * count + tensor, begin, SECOND, ALIGNED)
    out_at = pointer(table, 4 * count + tensor, begin, OUT, ALIGNED)
    offsets = tl.arange(0, BLOCK)
    skip = False
    if FOUND:
        skip = tl.load(found) != 0
    if skip:
        # The direction is not used, but must be finite.
        tl.store(out_at + offsets, tl.zeros([BLOCK], OUT), mask=offsets < left)
    else:
        step = tl.load(tl.load(table + 5 * count + tensor).to(tl.pointer_type(tl.float32)))
        first = 1 / minus_expm1(step * log1)
        second = 1 / tl.sqrt_rn(minus_expm1(step * log2))
        # The decay of the slow average is ½^(1 / (1 + h)), with h interpolated between the half-lives of β₁ and β₃.
        progress = tl.minimum(step / warmup, 1.0)
        early = tl.where(progress < 1, (1 - progress) * half_life1, 0.0)
        late = tl.where(progress > 0, progress * half_life3, 0.0)
        slow = minus_expm1(-0.6931471805599453 / tl.abs(1 + early + late))
        tau = 0.0
        if FORM > 0:
            tau = tl.load(taus + matrix)
        random = offsets.to(tl.uint32)
        other = random
        if CHANCE:
            seed = tl.load(table + 6 * count + tensor)
            random = noise(seed, step, begin, offsets, 0)
            other = noise(seed, step, begin, offsets, 1)
        if left >= BLOCK:
            _ademamix(
                g_at, m_at, s_at, v_at, out_at, offsets, 0, random, other, tau,
                rest1, slow, beta2, rest2, first, second, alpha * progress, eps, FORM, CHANCE, False,
            )  # fmt: skip
        else:
            _ademamix(
                g_at, m_at, s_at, v_at, out_at, offsets, left, random, other, tau,
                rest1, slow, beta2, rest2, first, second, alpha * progress, eps, FORM, CHANCE, True,
            )  # fmt: skip


@operator(
    mutates=("exp_avgs", "exp_avgs_slow", "exp_avg_sqs", "out"),
    cost=lambda g, m, s, v, steps, out, *rest: entrywise_cost([g, m, s, v], [m, s, v, out]),
)
def ademamix_directions(
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avgs_slow: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    out: list[Tensor],
    betas: list[float],
    alpha: float,
    eps: float,
    warmup_steps: int | None,
    found: Tensor | None,
    taus: Tensor | None,
    runs: list[int] | None,
    form: str,
    seeds: list[int] | None,
) -> None:
    """:func:`~spectrim.kernels.ademamix.ademamix_directions` as an operator."""
    beta1, beta2, beta3 = betas
    numbers = (1 - beta1, beta2, 1 - beta2, log_of(beta1), log_of(beta2), _half_life(beta1), _half_life(beta3), alpha)
    # Without warm-up, progress is 1 in every step.
    warmup = 0.5 if warmup_steps is None else float(warmup_steps)
    counts = addresses(steps)
    for part in launches_of(runs, grads, exp_avgs, exp_avgs_slow, exp_avg_sqs, out):
        part.launch(
            _kernel,
            upload(grads[0].device, [*part.rows, part.of(counts, 0), part.of(seeds, 0)]),
            found,
            taus,
            *numbers,
            warmup,
            eps,
            *part.types,
            form_number(taus, form),
            seeds is not None,
            found is not None,
        )


def _half_life(beta: float) -> float:
    """The half-life in steps, minus one; infinite for a decay of 1."""
    return math.log(0.5) / math.log(beta) - 1 if 0 < beta < 1 else -1.0 if beta == 0 else math.inf
