r"""The spike of a matrix, its few dominant singular directions: followed over time, and shrunk to the tail's scale.

One warm-started power step per update follows the spike of a slowly turning matrix; only the right basis V is kept
between updates. Shaping replaces the spike's singular values by the root mean square of the tail's. It is available
as a matrix (:func:`shape_spike`) and as a rank-k correction that an update can apply without forming that matrix
(:func:`spike_correction`). Source: arXiv 2602.11185.

An optimizer calls :func:`follow_and_shape_stacks`. What has k columns is laid out there as one stack for all shapes,
padded with zeros, so that little is launched; nothing waits for the device, and nothing is sent to it twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.kernels.spike import DEAD_DIRECTION, DEPENDENT, EMPTY_TAIL, PLAIN_TAIL, SHIFT, SMALLEST

from ._constants import constant
from ._precision import float32_product
from ._product import product
from ._stack import as_matrices, energy, reading_is_free
from ._stack_product import arithmetic

__all__ = [
    "Spike",
    "SpikeCorrection",
    "follow_and_shape",
    "follow_and_shape_stacks",
    "shape_spike",
    "spike_correction",
    "start_basis",
    "track_spike",
]

START_STEPS = 4  # power steps where no basis is at hand
TAIL_ENTRIES = 2**26  # entries of the tail formed at a time, or one row


class Spike(NamedTuple):
    """A rank-k approximation U Wᵀ of a matrix (..., m, n), with W = MᵀU.

    U: (..., m, k), orthonormal columns, or zeros where M V has fewer independent ones. W: (..., n, k). V: (..., n, k),
    the columns of W at unit length: the basis from which the next step starts. All in the working precision, float32
    or float64.
    """

    U: Tensor
    W: Tensor
    V: Tensor


class SpikeCorrection(NamedTuple):
    """The shaped matrix O = M + U rightᵀ, unformed, and norm = ‖O‖_F of shape (...).

    The norm is zero where M is. It may be denormal: whoever divides by it needs a floor.
    """

    U: Tensor
    right: Tensor
    norm: Tensor


def track_spike(M: Tensor, V: Tensor | None, *, rank: int | None = None, steps: int = 1) -> Spike:
    r"""Follow the k dominant singular directions of M by warm-started power steps.

        U ← orth(M V);  W ← MᵀU;  V ← W / its column norms

    Args:
        M: (..., m, n), floating point. Leading dimensions are a stack of independent matrices.
        V: (..., n, k), the basis of the step before, any floating dtype; None to start from nothing.
        rank: k, at most min(m, n); needed where V is None.
        steps: power steps; a start from nothing takes at least four.

    Returns:
        The spike, in M's working precision. Directions in which M has no energy keep their column of V.

    Raises:
        ValueError: neither V nor rank is given, or one does not fit M.
    """
    Y = as_matrices(M, "M")
    m, n = Y.shape[-2:]
    if steps < 1:
        raise ValueError(f"steps={steps}: expected a positive integer")
    if V is None:
        if rank is None or not 1 <= rank <= min(m, n):
            raise ValueError(f"rank={rank} with V=None for M of shape {tuple(M.shape)}: expected 1 to {min(m, n)}")
        steps = max(steps, START_STEPS)
        V = start_basis(n, rank, device=Y.device, dtype=Y.dtype).expand(*Y.shape[:-2], n, rank)
    elif V.shape[:-1] != (*Y.shape[:-2], n) or not 1 <= V.shape[-1] <= min(m, n) or rank not in (None, V.shape[-1]):
        raise ValueError(
            f"V of shape {tuple(V.shape)}, rank={rank}, for M of shape {tuple(M.shape)}: expected "
            f"(*{tuple(Y.shape[:-2])}, {n}, k) and a rank from 1 to {min(m, n)}"
        )
    k = V.shape[-1]
    flat = Y.reshape(-1, m, n)
    found = _follow([flat], [V.to(Y.dtype).reshape(-1, n, k)], steps)
    stack = Y.shape[:-2]
    return Spike(found.U.view(*stack, m, k), found.W.view(*stack, n, k), found.V[0].view(*stack, n, k))


def follow_and_shape(M: Tensor, V: Tensor, *, steps: int = 1) -> tuple[SpikeCorrection, Tensor]:
    """:func:`follow_and_shape_stacks` for one stack (..., m, n) with its bases (..., n, k)."""
    stack = M.shape[:-2]
    ((correction, basis),) = follow_and_shape_stacks([M.flatten(0, -3)], [V.flatten(0, -3)], steps=steps)
    U, right, norm = correction
    U, right, norm, basis = (x.reshape(*stack, *x.shape[1:]) for x in (U, right, norm, basis))
    return SpikeCorrection(U, right, norm), basis


@torch.no_grad()
def follow_and_shape_stacks(
    Ms: Sequence[Tensor], Vs: Sequence[Tensor], *, steps: int = 1
) -> list[tuple[SpikeCorrection, Tensor]]:
    """:func:`track_spike` and :func:`spike_correction` in one, for many stacks: what an optimizer's step needs.

    Args:
        Ms: (E, m, n) each, float32 or all float64, of any strides. At least one, none empty.
        Vs: the bases (E, n, k) of the step before, in the same dtype.
        steps: power steps.

    Returns:
        For each stack its correction and the new basis. Parts of different stacks may be views of one tensor. A tail
        is formed beside its stack, at most 256 MB or one row at a time.
    """
    found = _follow(Ms, Vs, steps)
    with arithmetic(Ms[0].device, Ms[0].dtype):
        tail = _joined(
            [_tail_norm(*parts) for parts in zip(Ms, found.left, found.right, _each(found.lengths, Ms), strict=True)]
        )
    shaping = _shaped(tail.square(), found.lengths, _limits(Ms, Vs, tail))
    factor = torch.where(shaping.alive, shaping.sigma / found.lengths - 1, 0.0).to(found.W.dtype)
    right = _parts(found.W * factor[:, None, :], Ms, Vs, -1)
    norms = _each(shaping.norm.to(found.W.dtype), Ms)
    return [
        (SpikeCorrection(U, columns, norm), V)
        for U, columns, norm, V in zip(found.left, right, norms, found.V, strict=True)
    ]


def shape_spike(M: Tensor, spike: Spike) -> Tensor:
    """Shrink the spike's singular values to the root mean square of the tail's, and leave the tail untouched.

        M_tail = M − U Wᵀ;  σ² = ‖M_tail‖_F² / (min(m, n) − k);  O = M_tail + σ U Vᵀ

    Returns:
        O, a new tensor of M's shape and dtype. O = M where the tail holds no energy, or k reaches min(m, n).
    """
    Y = as_matrices(M, "M")
    U, right, _ = spike_correction(M, spike)
    return (Y + float32_product(U, right.mT)).to(M.dtype)


def spike_correction(M: Tensor, spike: Spike) -> SpikeCorrection:
    """The shaped matrix of :func:`shape_spike` as M plus a rank-k correction, and its Frobenius norm.

    An update that needs η O / RMS(O) applies it as M times a scalar and then the correction: O is never formed, and
    M is read once here, for the tail's norm.
    """
    Y = as_matrices(M, "M")
    stack = Y.shape[:-2]
    Y, U, W, V = (x.reshape(-1, *x.shape[-2:]) for x in (Y, *spike))
    lengths = torch.linalg.vector_norm(W, dim=-2, dtype=torch.float64)
    with arithmetic(Y.device, Y.dtype):
        tail = _tail_norm(Y, U, W, lengths)
    alive, sigma, norm = _shaped(tail.square(), lengths, _limits([Y], [V], tail))
    right = torch.where(alive[:, None, :], sigma[..., None].to(W.dtype) * V - W, 0.0)
    norm = norm.to(W.dtype).reshape(stack)
    return SpikeCorrection(spike.U, right.reshape(spike.W.shape), norm)


def start_basis(n: int, k: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """An n x k matrix of fixed numbers in [-1, 1) that look random: a function of its shape, on every device the same.

    No random generator is involved, so none is disturbed.
    """
    bits = torch.arange(1, n * k + 1, device=device, dtype=torch.int64)
    for multiplier in (0x45D9F3B, 0x45D9F3B, 1):  # a 32-bit integer hash: xor with the high half, multiply
        bits = ((bits ^ (bits >> 16)) * multiplier) & 0xFFFFFFFF
    return (bits.to(dtype) / 2**31 - 1).reshape(n, k)


class _Followed(NamedTuple):
    """U (E, m, k), W (E, n, k) and its columns' lengths (E, k) in float64 for all stacks, padded with zeros.

    left and right are their parts and V the new bases, for each stack.
    """

    U: Tensor
    W: Tensor
    lengths: Tensor
    left: list[Tensor]
    right: list[Tensor]
    V: list[Tensor]


def _follow(Ms: Sequence[Tensor], Vs: Sequence[Tensor], steps: int) -> _Followed:
    """Power steps U ← orth(M V);  W ← MᵀU;  V ← W / its column norms, for stacks of any shapes."""
    rows, columns, ranks = (
        max(sizes) for sizes in zip(*(M.shape[1:] + V.shape[2:] for M, V in zip(Ms, Vs, strict=True)), strict=True)
    )
    with arithmetic(Ms[0].device, Ms[0].dtype):
        for _ in range(steps):
            U = _orthonormal(_products(Ms, Vs, rows, ranks))
            left = _parts(U, Ms, Vs, -2)
            W = _products([M.mT for M in Ms], left, columns, ranks)
            lengths: Tensor = torch.linalg.vector_norm(W, dim=-2, dtype=torch.float64)
            alive = (lengths > DEAD_DIRECTION * lengths.amax(-1, keepdim=True))[:, None, :]
            # In float64, for the length of a denormal column has few digits in float32.
            unit = (W / torch.where(alive, lengths[:, None, :], 1.0)).to(W.dtype)
            Vs = [
                torch.where(keep[..., : V.shape[-1]], new, V)
                for keep, new, V in zip(_each(alive, Ms), _parts(unit, Ms, Vs, -1), Vs, strict=True)
            ]
    return _Followed(U, W, lengths, left, _parts(W, Ms, Vs, -1), list(Vs))


def _orthonormal(A: Tensor) -> Tensor:
    """The Q of A's QR decomposition up to signs, (E, m, k), by Cholesky's factor of the Gram matrix, twice.

    In float64, which holds the square of any condition number that float32 columns can have; they are few. Columns
    that depend on the ones before them become zero.
    """
    Q = A / torch.linalg.vector_norm(A, dim=-2, keepdim=True, dtype=torch.float64).clamp_min(SMALLEST)
    for first in (True, False):
        gram = Q.mT @ Q
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        # So that columns of zeros have a factor as well, and so does what rounding left of one that depends on others:
        # it is short, but may lie in their span to the last digit.
        if first:
            diagonal.clamp_min_(1 + SHIFT)
        else:
            diagonal.add_(SHIFT)
        L = torch.linalg.cholesky_ex(gram).L
        Q = torch.linalg.solve_triangular(L.mT, Q, upper=True, left=False)
        if first:
            Q = Q * (L.diagonal(dim1=-2, dim2=-1) > DEPENDENT)[:, None, :]
    result: Tensor = Q.to(A.dtype)
    return result


class _Shaping(NamedTuple):
    """Which directions are shrunk (E, k), to which σ (E, 1), and ‖O‖_F (E,)."""

    alive: Tensor
    sigma: Tensor
    norm: Tensor


def _shaped(tail: Tensor, lengths: Tensor, limits: Tensor) -> _Shaping:
    """From the energy of the tails (E,), the lengths of W's columns (E, k) and :func:`_limits`; all in float64."""
    spare, empty = limits.unbind()
    energies = lengths.square()
    whole = tail + energies.sum(-1)
    sigma = (tail / spare).sqrt()[:, None]
    # A direction without energy stays as it is: lifting it to the tail's scale would add noise of that size.
    least = torch.where(tail > empty * whole, DEAD_DIRECTION * whole.sqrt(), math.inf)
    alive = lengths > least[:, None]
    norm = (tail + torch.where(alive, sigma.square(), energies).sum(-1)).sqrt()
    return _Shaping(alive, sigma, norm)


def _limits(Ms: Sequence[Tensor], Vs: Sequence[Tensor], like: Tensor) -> Tensor:
    """For each matrix, (2, E): the number of the tail's directions, and the share of the energy it must exceed."""
    spares = [min(M.shape[1:]) - V.shape[-1] for M, V in zip(Ms, Vs, strict=True)]
    counts = [len(M) for M in Ms]
    pairs = [(max(spare, 1), EMPTY_TAIL if spare > 0 else math.inf) for spare in spares]
    if torch.compiler.is_compiling():
        return torch.stack(
            [
                torch.cat([like.new_full((count,), pair[i]) for count, pair in zip(counts, pairs, strict=True)])
                for i in (0, 1)
            ]
        )
    return constant(
        ("spike", tuple(spares), tuple(counts)),
        like,
        lambda: [[pair[i] for count, pair in zip(counts, pairs, strict=True) for _ in range(count)] for i in (0, 1)],
    )


def _tail_norm(M: Tensor, U: Tensor, W: Tensor, lengths: Tensor) -> Tensor:
    """‖M − U Wᵀ‖_F (E,), in float64.

    The square root of ‖M‖_F² − ‖W‖_F² is the same and far cheaper, but off by float32's rounding of W: worthless once
    the tail holds less than 1e-6 of the energy, where it would blow up noise. So where it can be seen that the tail is
    no such remainder the difference is taken, and otherwise the tail is formed, in parts where it is large.
    """
    if reading_is_free(M):
        spike = lengths.square().sum(-1)
        difference = energy(M) - spike
        if bool((difference > PLAIN_TAIL * spike).all()):
            return difference.sqrt()
    E, m, n = M.shape
    if E > 1 and M.numel() > TAIL_ENTRIES:
        size = max(1, TAIL_ENTRIES // (m * n))
        return torch.cat([_formed(*parts) for parts in zip(*(torch.split(x, size) for x in (M, U, W)), strict=True)])
    return _formed(M, U, W)


def _formed(M: Tensor, U: Tensor, W: Tensor) -> Tensor:
    rows = max(1, TAIL_ENTRIES // (len(M) * M.shape[-1]))
    if rows < M.shape[-2]:
        blocks = zip(torch.split(M, rows, -2), torch.split(U, rows, -2), strict=True)
        parts = torch.stack([_formed(m, u, W) for m, u in blocks])
        norm: Tensor = torch.linalg.vector_norm(parts, dim=0)
    else:
        D = _multiply(U, W.mT).sub_(M)
        norm = torch.linalg.vector_norm(D, dim=(-2, -1), dtype=torch.float64)
    return norm


def _products(lefts: Sequence[Tensor], rights: Sequence[Tensor], rows: int, columns: int) -> Tensor:
    """The products of pairs in one stack (E, rows, columns), padded with zeros."""
    if len(lefts) == 1:
        return _multiply(lefts[0], rights[0])
    result = lefts[0].new_zeros(sum(map(len, lefts)), rows, columns)
    for A, B, place in zip(lefts, rights, torch.split(result, list(map(len, lefts))), strict=True):
        place = place[:, : A.shape[-2], : B.shape[-1]]
        if reading_is_free(A) or torch.compiler.is_compiling():
            place.copy_(_multiply(A, B))
        else:
            torch.bmm(A, B, out=place)
    return result


def _multiply(A: Tensor, B: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return float32_product(A, B)
    return product(A, B) if reading_is_free(A) else torch.bmm(A, B)


def _parts(whole: Tensor, Ms: Sequence[Tensor], Vs: Sequence[Tensor], side: int) -> list[Tensor]:
    """Each stack's part of a padded (E, m or n, k), for ``side`` -2 or -1 of the matrices."""
    return [part[:, : M.shape[side], : V.shape[-1]] for part, M, V in zip(_each(whole, Ms), Ms, Vs, strict=True)]


def _each(whole: Tensor, Ms: Sequence[Tensor]) -> Sequence[Tensor]:
    """The rows that belong to each stack."""
    return torch.split(whole, [len(M) for M in Ms])


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
