r"""The spike of a matrix, its few dominant singular directions: tracked over time and shrunk to the tail's scale.

One warm-started power step per update tracks the spike of a slowly changing matrix; only the right basis V is kept
between updates. Shaping replaces the spike's singular values by the root mean square of the tail's.
:func:`shape_spike` returns the shaped matrix, and :func:`spike_correction` the rank-k difference from the original.
Source: arXiv 2602.11185.

Optimizers call :func:`follow_and_shape_stacks`. It pads thin matrices, of k columns, with zeros and joins them to one
stack to reduce the number of launches. The host never waits for the device, and constants are uploaded once.
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
    "follow_and_shape_stacks",
    "shape_spike",
    "spike_correction",
    "start_basis",
    "track_spike",
]

START_STEPS = 4  # power steps without a previous basis
TAIL_ENTRIES = 2**26  # entries of the tail formed at a time, or one row


class Spike(NamedTuple):
    """A rank-k approximation U Wᵀ of a matrix (..., m, n), with W = MᵀU.

    All are in the working precision, float32 or float64.

    Attributes:
        U: (..., m, k), orthonormal columns; dependent columns of M V become zero.
        W: (..., n, k).
        V: (..., n, k), the columns of W at unit length, from which the next step starts.
    """

    U: Tensor
    W: Tensor
    V: Tensor


class SpikeCorrection(NamedTuple):
    """The factors of the shaped matrix O = M + U rightᵀ, and norm = ‖O‖_F of shape (...).

    The norm is zero for M = 0 and may be denormal: apply a floor before dividing by it.
    """

    U: Tensor
    right: Tensor
    norm: Tensor


def track_spike(M: Tensor, V: Tensor | None, *, rank: int | None = None, steps: int = 1) -> Spike:
    r"""Track the k dominant singular directions of M by warm-started power steps.

        U ← orth(M V);  W ← MᵀU;  V ← W / its column norms

    Args:
        M: (..., m, n), floating point. Leading dimensions are a stack of independent matrices.
        V: (..., n, k), the basis of the previous step, any floating dtype; None starts from fixed pseudorandom numbers.
        rank: k, at most min(m, n); required if V is None.
        steps: power steps; at least four are taken if V is None.

    Returns:
        The spike, in M's working precision. Directions in which M has no energy keep their column of V.

    Raises:
        ValueError: V and rank are both missing, or do not match M.
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
    spikes = _follow([flat], [V.to(Y.dtype).reshape(-1, n, k)], steps)
    stack = Y.shape[:-2]
    return Spike(spikes.U.view(*stack, m, k), spikes.W.view(*stack, n, k), spikes.V[0].view(*stack, n, k))


@torch.no_grad()
def follow_and_shape_stacks(
    Ms: Sequence[Tensor], Vs: Sequence[Tensor], *, steps: int = 1
) -> list[tuple[SpikeCorrection, Tensor]]:
    """:func:`track_spike` and :func:`spike_correction` for the stacks of an optimizer's step.

    Args:
        Ms: stacks (E, m, n), all float32 or all float64, of any strides. At least one, none empty.
        Vs: the bases (E, n, k) of the previous step, in the same dtype.
        steps: power steps.

    Returns:
        The correction and the new basis of every stack. Results of different stacks may be views of one tensor. At most
        256 MB, or one row, of a tail are in memory at a time.
    """
    spikes = _follow(Ms, Vs, steps)
    with arithmetic(Ms[0].device, Ms[0].dtype):
        parts = zip(Ms, spikes.left, spikes.right, _split(spikes.lengths, Ms), strict=True)
        tail = _joined([_tail_norm(*part) for part in parts])
    shaping = _shaped(tail.square(), spikes.lengths, _limits(Ms, Vs, tail))
    factor = torch.where(shaping.alive, shaping.sigma / spikes.lengths - 1, 0.0).to(spikes.W.dtype)
    right = _parts(spikes.W * factor[:, None, :], Ms, Vs, -1)
    norms = _split(shaping.norm.to(spikes.W.dtype), Ms)
    return [
        (SpikeCorrection(U, columns, norm), V)
        for U, columns, norm, V in zip(spikes.left, right, norms, spikes.V, strict=True)
    ]


def shape_spike(M: Tensor, spike: Spike) -> Tensor:
    """Replace the spike's singular values by the root mean square of the tail's, and keep the tail.

        M_tail = M − U Wᵀ;  σ² = ‖M_tail‖_F² / (min(m, n) − k);  O = M_tail + σ U Vᵀ

    Returns:
        O, a new tensor of M's shape and dtype. O = M if the tail has no energy or k = min(m, n).
    """
    Y = as_matrices(M, "M")
    U, right, _ = spike_correction(M, spike)
    return (Y + float32_product(U, right.mT)).to(M.dtype)


def spike_correction(M: Tensor, spike: Spike) -> SpikeCorrection:
    """The shaped matrix of :func:`shape_spike` as M plus a rank-k correction, and its Frobenius norm.

    An update by η O / RMS(O) adds M times a scalar and then the correction, without forming O. M is read once, for the
    tail's norm.
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
    """An n x k matrix of pseudorandom numbers in [-1, 1) that depend on its shape only, not on device or generator."""
    bits = torch.arange(1, n * k + 1, device=device, dtype=torch.int64)
    for multiplier in (0x45D9F3B, 0x45D9F3B, 1):  # a 32-bit integer hash: xor with the high half, multiply
        bits = ((bits ^ (bits >> 16)) * multiplier) & 0xFFFFFFFF
    return (bits.to(dtype) / 2**31 - 1).reshape(n, k)


class _Followed(NamedTuple):
    """U (E, m, k), W (E, n, k) and its columns' lengths (E, k) in float64 for all stacks, padded with zeros.

    Lists by stack: left and right are the parts of U and W, and V the new bases.
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
            # In float64, since the length of a denormal column has few digits in float32.
            unit = (W / torch.where(alive, lengths[:, None, :], 1.0)).to(W.dtype)
            Vs = [
                torch.where(keep[..., : V.shape[-1]], new, V)
                for keep, new, V in zip(_split(alive, Ms), _parts(unit, Ms, Vs, -1), Vs, strict=True)
            ]
    return _Followed(U, W, lengths, left, _parts(W, Ms, Vs, -1), list(Vs))


def _orthonormal(A: Tensor) -> Tensor:
    """The Q of A's QR decomposition up to signs, (E, m, k), by Cholesky-QR, twice.

    In float64, which represents the squared condition number of any float32 columns. Columns that depend on previous
    columns become zero.
    """
    Q = A / torch.linalg.vector_norm(A, dim=-2, keepdim=True, dtype=torch.float64).clamp_min(SMALLEST)
    for first in (True, False):
        gram = Q.mT @ Q
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        # Makes the Gram matrix positive definite if columns are zero or depend on others up to rounding.
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
    """The directions that are shrunk (E, k), their new σ (E, 1), and ‖O‖_F (E,)."""

    alive: Tensor
    sigma: Tensor
    norm: Tensor


def _shaped(tail: Tensor, lengths: Tensor, limits: Tensor) -> _Shaping:
    """Compute the shaping from the tails' energies (E,), W's column lengths (E, k) and :func:`_limits`, in float64."""
    spare, empty = limits.unbind()
    energies = lengths.square()
    whole = tail + energies.sum(-1)
    sigma = (tail / spare).sqrt()[:, None]
    # A direction without energy stays as it is, since raising it to the tail's scale would add noise.
    least = torch.where(tail > empty * whole, DEAD_DIRECTION * whole.sqrt(), math.inf)
    alive = lengths > least[:, None]
    norm = (tail + torch.where(alive, sigma.square(), energies).sum(-1)).sqrt()
    return _Shaping(alive, sigma, norm)


def _limits(Ms: Sequence[Tensor], Vs: Sequence[Tensor], like: Tensor) -> Tensor:
    """The number of the tail's directions, and the least share of energy that it needs for shaping, as (2, E)."""
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

    √(‖M‖_F² − ‖W‖_F²) is the same and far cheaper, but its error is float32's rounding of W, which exceeds a tail of
    less than 1e-6 of the energy. The difference is used if the host can read it and it is large enough; otherwise
    M − U Wᵀ is formed, in parts if it is large.
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
    """The products of pairs of stacks, as one stack (E, rows, columns) padded with zeros."""
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
    """The stacks' parts of a padded tensor whose rows are the matrices' rows (``side`` -2) or columns (-1)."""
    return [part[:, : M.shape[side], : V.shape[-1]] for part, M, V in zip(_split(whole, Ms), Ms, Vs, strict=True)]


def _split(whole: Tensor, Ms: Sequence[Tensor]) -> Sequence[Tensor]:
    """Split the first dimension by stacks."""
    return torch.split(whole, [len(M) for M in Ms])


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
