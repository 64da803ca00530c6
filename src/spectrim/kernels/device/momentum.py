"""Momentum over lists in Triton."""

import triton
import triton.language as tl
from torch import Tensor

from ..costs import entrywise_cost
from ..table import upload
from .common import entries, mean_of, noise, pointer, put, shrink, work_of
from .operators import addresses, form_number, launches_of, operator

__all__ = ["momentum_directions"]


@triton.jit
def _momentum(
    g_at, m_at, out_at, offsets, left, random, tau, decay, rest,
    AVERAGE: tl.constexpr, NESTEROV: tl.constexpr, SIGN: tl.constexpr,
    FORM: tl.constexpr, CHANCE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    g = shrink(entries(g_at, offsets, left, MASKED), tau, FORM)
    m = entries(m_at, offsets, left, MASKED)
    if AVERAGE:
        m = mean_of(m, g, rest)
        d = mean_of(g, m, decay) if NESTEROV else m
    else:
        m = decay * m + g
        d = g + decay * m if NESTEROV else m
    put(m_at, offsets, left, m, random, CHANCE, MASKED)
    if SIGN:
        # NaN stays NaN.
        d = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
    put(out_at, offsets, left, d, random, False, MASKED)


@triton.jit(do_not_specialize=["count"])
def _kernel(
    table, blocks, count, found, taus, decay, rest,
    GRAD: tl.constexpr, STATE: tl.constexpr, OUT: tl.constexpr,
    AVERAGE: tl.constexpr, NESTEROV: tl.constexpr, SIGN: tl.constexpr, STEPS: tl.constexpr,
    FORM: tl.constexpr, CHANCE: tl.constexpr, FOUND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, matrix, begin, left = work_of(blocks, ALIGNED)
    g_at = pointer(table, tensor, begin, GRAD, ALIGNED)
    m_at = pointer(table, count + tensor, begin, STATE, ALIGNED)
    out_at = pointer(table, 2 * count + tensor, begin, OUT, ALIGNED)
    offsets = tl.arange(0, BLOCK)
    skip = False
    if FOUND:
        skip = tl.load(found) != 0
    if skip:
        # The direction is not used, but must be finite.
        tl.store(out_at + offsets, tl.zeros([BLOCK], OUT), mask=offsets < left)
    else:
        tau = 0.0
        if FORM > 0:
            tau = tl.load(taus + matrix)
        random = offsets.to(tl.uint32)
        if CHANCE:
            step = 0.0
            if STEPS:
                step = tl.load(tl.load(table + 4 * count + tensor).to(tl.pointer_type(tl.float32)))
            random = noise(tl.load(table + 3 * count + tensor), step, begin, offsets, 0)
        if left >= BLOCK:
            _momentum(
                g_at, m_at, out_at, offsets, 0, random, tau, decay, rest, AVERAGE, NESTEROV, SIGN, FORM, CHANCE, False
            )
        else:
            _momentum(
                g_at, m_at, out_at, offsets, left, random, tau, decay, rest, AVERAGE, NESTEROV, SIGN, FORM, CHANCE, True
            )


@operator(
    mutates=("buffers", "out"),
    cost=lambda g, m, out, *rest: entrywise_cost([g, m], [m, out]),
)
def momentum_directions(
    grads: list[Tensor],
    buffers: list[Tensor],
    out: list[Tensor],
    decay: float,
    average: bool,
    nesterov: bool,
    sign: bool,
    found: Tensor | None,
    taus: Tensor | None,
    runs: list[int] | None,
    form: str,
    seeds: list[int] | None,
    steps: list[Tensor],
) -> None:
    """:func:`~spectrim.kernels.momentum.momentum_directions` as an operator."""
    counts = addresses(steps) or None
    for part in launches_of(runs, grads, buffers, out):
        part.launch(
            _kernel,
            upload(grads[0].device, [*part.rows, part.of(seeds, 0), part.of(counts, 0)]),
            found,
            taus,
            decay,
            1 - decay,
            *part.types,
            average,
            nesterov,
            sign,
            bool(steps),
            form_number(taus, form),
            seeds is not None,
            found is not None,
        )
