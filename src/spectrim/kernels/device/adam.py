"""Adam's directions and AdamW's step over lists, in Triton."""

import math

import triton
import triton.language as tl
from torch import Tensor

from ..costs import entrywise_cost
from ..table import upload
from .common import entries, mean_of, minus_expm1, noise, number, number_or_tensor, pointer, put, shrink, work_of
from .operators import addresses, addresses_at, form_number, launches_of, operator

__all__ = ["adam_directions", "adamw_step"]


@triton.jit
def _adam(
    g_at, m_at, v_at, offsets, left, random, tau, rest1, beta2, rest2, first, second, eps,
    FORM: tl.constexpr, CHANCE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The direction of a block; stores its moments. ``first`` and ``second`` are 1 / (1 − β₁ᵗ) and 1 / √(1 − β₂ᵗ)."""
    g = shrink(entries(g_at, offsets, left, MASKED), tau, FORM)
    m = entries(m_at, offsets, left, MASKED)
    v = entries(v_at, offsets, left, MASKED)
    m = mean_of(m, g, rest1)
    v = beta2 * v + rest2 * g * g
    put(m_at, offsets, left, m, random, CHANCE, MASKED)
    put(v_at, offsets, left, v, random >> 16, CHANCE, MASKED)
    return m * first / (tl.sqrt_rn(v) * second + eps)


@triton.jit(do_not_specialize=["count"])
def _directions_kernel(
    table, blocks, count, found, taus, rest1, beta2, rest2, log1, log2, eps,
    GRAD: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, OUT: tl.constexpr,
    FORM: tl.constexpr, CHANCE: tl.constexpr, FOUND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, matrix, begin, left = work_of(blocks, ALIGNED)
    g_at = pointer(table, tensor, begin, GRAD, ALIGNED)
    m_at = pointer(table, count + tensor, begin, FIRST, ALIGNED)
    v_at = pointer(table, 2 * count + tensor, begin, SECOND, ALIGNED)
    out_at = pointer(table, 3 * count + tensor, begin, OUT, ALIGNED)
    offsets = tl.arange(0, BLOCK)
    skip = False
    if FOUND:
        skip = tl.load(found) != 0
    if skip:
        # The direction is not used, but must be finite.
        tl.store(out_at + offsets, tl.zeros([BLOCK], OUT), mask=offsets < left)
    else:
        step = tl.load(tl.load(table + 4 * count + tensor).to(tl.pointer_type(tl.float32)))
        first = 1 / minus_expm1(step * log1)
        second = 1 / tl.sqrt_rn(minus_expm1(step * log2))
        tau = 0.0
        if FORM > 0:
            tau = tl.load(taus + matrix)
        random = offsets.to(tl.uint32)
        if CHANCE:
            random = noise(tl.load(table + 5 * count + tensor), step, begin, offsets, 0)
        if left >= BLOCK:
            d = _adam(
                g_at, m_at, v_at, offsets, 0, random, tau, rest1, beta2, rest2, first, second, eps, FORM, CHANCE, False
            )
            put(out_at, offsets, 0, d, random, False, False)
        else:
            d = _adam(
                g_at, m_at, v_at, offsets, left, random, tau, rest1, beta2, rest2, first, second, eps,
                FORM, CHANCE, True,
            )  # fmt: skip
            put(out_at, offsets, left, d, random, False, True)


@triton.jit(do_not_specialize=["count"])
def _step_kernel(
    table, blocks, count, found, taus, rest1, beta2, rest2, log1, log2, eps,
    PARAM: tl.constexpr, GRAD: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    FORM: tl.constexpr, CHANCE: tl.constexpr, FOUND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, matrix, begin, left = work_of(blocks, ALIGNED)
    p_at = pointer(table, tensor, begin, PARAM, ALIGNED)
    g_at = pointer(table, count + tensor, begin, GRAD, ALIGNED)
    m_at = pointer(table, 2 * count + tensor, begin, FIRST, ALIGNED)
    v_at = pointer(table, 3 * count + tensor, begin, SECOND, ALIGNED)
    offsets = tl.arange(0, BLOCK)
    skip = False
    if FOUND:
        skip = tl.load(found) != 0
    if not skip:
        step = tl.load(tl.load(table + 4 * count + tensor).to(tl.pointer_type(tl.float32)))
        first = 1 / minus_expm1(step * log1)
        second = 1 / tl.sqrt_rn(minus_expm1(step * log2))
        lr = number_or_tensor(table, 7 * count + tensor, 6 * count + tensor)
        keep = 1 - lr * number(table, 8 * count + tensor)
        tau = 0.0
        if FORM > 0:
            tau = tl.load(taus + matrix)
        random = offsets.to(tl.uint32)
        other = random
        if CHANCE:
            seed = tl.load(table + 5 * count + tensor)
            random = noise(seed, step, begin, offsets, 0)
            other = noise(seed, step, begin, offsets, 1)
        if left >= BLOCK:
            d = _adam(
                g_at, m_at, v_at, offsets, 0, random, tau, rest1, beta2, rest2, first, second, eps, FORM, CHANCE, False
            )
            put(p_at, offsets, 0, entries(p_at, offsets, 0, False) * keep - lr * d, other, CHANCE, False)
        else:
            d = _adam(
                g_at, m_at, v_at, offsets, left, random, tau, rest1, beta2, rest2, first, second, eps,
                FORM, CHANCE, True,
            )  # fmt: skip
            put(p_at, offsets, left, entries(p_at, offsets, left, True) * keep - lr * d, other, CHANCE, True)


def _numbers(beta1: float, beta2: float, eps: float) -> tuple[float, ...]:
    """The coefficients of both kernels."""
    return 1 - beta1, beta2, 1 - beta2, log_of(beta1), log_of(beta2), eps


def log_of(beta: float) -> float:
    """ln β; −∞ for zero."""
    return math.log(beta) if beta > 0 else -math.inf


@operator(
    mutates=("exp_avgs", "exp_avg_sqs", "out"),
    cost=lambda g, m, v, steps, out, *rest: entrywise_cost([g, m, v], [m, v, out]),
)
def adam_directions(
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    out: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    found: Tensor | None,
    taus: Tensor | None,
    runs: list[int] | None,
    form: str,
    seeds: list[int] | None,
) -> None:
    """:func:`~spectrim.kernels.adam.adam_directions` as an operator."""
    counts = addresses(steps)
    for part in launches_of(runs, grads, exp_avgs, exp_avg_sqs, out):
        part.launch(
            _directions_kernel,
            upload(grads[0].device, [*part.rows, part.of(counts, 0), part.of(seeds, 0)]),
            found,
            taus,
            *_numbers(beta1, beta2, eps),
            *part.types,
            form_number(taus, form),
            seeds is not None,
            found is not None,
        )


@operator(
    mutates=("params", "exp_avgs", "exp_avg_sqs"),
    cost=lambda p, g, m, v, *rest: entrywise_cost([p, g, m, v], [p, m, v]),
)
def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lrs: list[float],
    lr_tensors: list[Tensor],
    lr_places: list[int],
    weight_decays: list[float],
    beta1: float,
    beta2: float,
    eps: float,
    found: Tensor | None,
    taus: Tensor | None,
    runs: list[int] | None,
    form: str,
    seeds: list[int] | None,
) -> None:
    """:func:`~spectrim.kernels.adam.adamw_step` as an operator."""
    counts = addresses(steps)
    rates = addresses_at(lr_tensors, lr_places)
    for part in launches_of(runs, params, grads, exp_avgs, exp_avg_sqs):
        rows = [*part.rows, part.of(counts, 0), part.of(seeds, 0), part.of(rates, 0)]
        part.launch(
            _step_kernel,
            upload(params[0].device, rows, [part.of(lrs, 0.0), part.of(weight_decays, 0.0)]),
            found,
            taus,
            *_numbers(beta1, beta2, eps),
            *part.types,
            form_number(taus, form),
            seeds is not None,
            found is not None,
        )
