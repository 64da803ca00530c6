r"""The spike of a matrix, its few dominant singular directions: followed over time, and shrunk to the tail's scale.

One warm-started power step per update follows the spike of a slowly turning matrix; only the right basis V is kept
between updates. Shaping replaces the spike's singular values by the root mean square of the tail's. It is available
as a matrix (:func:`shape_spike`) and as a rank-k correction that an update can apply without forming that matrix
(:func:`spike_correction`). Source: arXiv 2602.11185.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._product import product
from ._stack import as_matrices, energy, reading_is_free

__all__ = [
    "Spike",
    "SpikeCorrection",
    "follow_and_shape",
    "shape_spike",
    "spike_correction",
    "start_basis",
    "track_spike",
]

START_STEPS = 4  # power steps where no basis is at hand
EMPTY_TAIL = 1e-10  # a tail with less of the energy than this is rounding: nothing to shrink the spike to
PLAIN_TAIL = 0.03  # a tail of this much energy against the spike's is no small difference of large numbers
TAIL_ROWS = 256  # rows of the tail formed at a time
DEAD_DIRECTION = 1e-6  # a direction that carries less of the norm than this is rounding too
MOST_AMPLIFIED = 30.0  # how much the kernel's W may magnify rounding: a followed spike stays near 1


class Spike(NamedTuple):
    """A rank-k approximation U Wᵀ of a matrix (..., m, n), with W = MᵀU.

    U: (..., m, k), orthonormal columns. W: (..., n, k). V: (..., n, k), the columns of W at unit length: the basis
    from which the next step starts. All in the working precision, float32 or float64.
    """

    U: Tensor
    W: Tensor
    V: Tensor


class SpikeCorrection(NamedTuple):
    """The shaped matrix O = M + U rightᵀ, unformed, and norm = ‖O‖_F of shape (...)."""

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
    V = V.to(Y.dtype)
    for _ in range(steps):
        U = torch.linalg.qr(product(Y, V)).Q
        W = product(Y.mT, U)
        length = _column_norms(W)
        alive = length > DEAD_DIRECTION * length.amax(-1, keepdim=True)
        V = torch.where(alive, W / torch.where(alive, length, 1.0), V)
    return Spike(U, W, V)


def follow_and_shape(M: Tensor, V: Tensor, *, steps: int = 1) -> tuple[SpikeCorrection, Tensor]:
    """:func:`track_spike` and :func:`spike_correction` in one, and the new basis: what an optimizer's step needs."""
    spike = track_spike(M, V, steps=steps)
    return spike_correction(M, spike), spike.V


def follow_and_shape_stacks(
    Ms: Sequence[Tensor], Vs: Sequence[Tensor], *, steps: int = 1
) -> list[tuple[SpikeCorrection, Tensor]]:
    """:func:`follow_and_shape` of several stacks."""
    return [follow_and_shape(M, V, steps=steps) for M, V in zip(Ms, Vs, strict=True)]


def shape_spike(M: Tensor, spike: Spike) -> Tensor:
    """Shrink the spike's singular values to the root mean square of the tail's, and leave the tail untouched.

        M_tail = M − U Wᵀ;  σ² = ‖M_tail‖_F² / (min(m, n) − k);  O = M_tail + σ U Vᵀ

    Returns:
        O, a new tensor of M's shape and dtype. O = M where the tail holds no energy, or k reaches min(m, n).
    """
    Y = as_matrices(M, "M")
    U, right, _ = spike_correction(M, spike)
    return (Y + U @ right.mT).to(M.dtype)


def spike_correction(M: Tensor, spike: Spike) -> SpikeCorrection:
    """The shaped matrix of :func:`shape_spike` as M plus a rank-k correction, and its Frobenius norm.

    An update that needs η O / RMS(O) applies it as M times a scalar and then the correction: O is never formed, and
    M is read once here, for the tail's norm.
    """
    U, W, V = spike
    Y = as_matrices(M, "M")
    spare = min(Y.shape[-2:]) - U.shape[-1]
    lengths = torch.linalg.vector_norm(W, dim=-2, dtype=torch.float64)
    tail = _tail_energy(Y, U, W, lengths.square().sum(-1))
    whole = tail + lengths.square().sum(-1)
    shaped = tail > EMPTY_TAIL * whole if spare > 0 else torch.zeros_like(tail, dtype=torch.bool)
    sigma = torch.where(shaped, tail / max(spare, 1), 0.0).sqrt()
    # A direction without energy stays as it is: lifting it to the tail's scale would add noise of that size.
    alive = shaped[..., None] & (lengths > DEAD_DIRECTION * whole.sqrt()[..., None])
    right = torch.where(alive[..., None, :], sigma[..., None, None].to(W.dtype) * V - W, 0.0)
    norm = torch.where(shaped, tail + alive.sum(-1) * sigma.square(), whole).sqrt()
    return SpikeCorrection(U, right, norm.to(W.dtype))


def start_basis(n: int, k: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """An n x k matrix of fixed numbers in [-1, 1) that look random: a function of its shape, on every device the same.

    No random generator is involved, so none is disturbed.
    """
    bits = torch.arange(1, n * k + 1, device=device, dtype=torch.int64)
    for multiplier in (0x45D9F3B, 0x45D9F3B, 1):  # a 32-bit integer hash: xor with the high half, multiply
        bits = ((bits ^ (bits >> 16)) * multiplier) & 0xFFFFFFFF
    return (bits.to(dtype) / 2**31 - 1).reshape(n, k)


def _tail_energy(M: Tensor, U: Tensor, W: Tensor, spike: Tensor) -> Tensor:
    """‖M − U Wᵀ‖_F² of every matrix, (...), in float64, for spike = ‖W‖_F².

    ‖M‖_F² − ‖W‖_F² is the same and far cheaper, but off by float32's rounding of W: worthless once the tail holds less
    than 1e-6 of the energy, where it would blow up noise. So where it can be seen that the tail is no such remainder
    the difference is taken, and otherwise the tail is formed, in blocks of rows so that it is never held whole.
    """
    if reading_is_free(M):
        difference = energy(M) - spike
        if bool((difference > PLAIN_TAIL * spike).all()):
            return difference
    blocks = zip(torch.split(M, TAIL_ROWS, dim=-2), torch.split(U, TAIL_ROWS, dim=-2), strict=True)
    return torch.stack([energy(m - u @ W.mT) for m, u in blocks]).sum(0)


def _column_norms(W: Tensor) -> Tensor:
    """(..., 1, k) Euclidean norms in float64, where the square of a large entry does not overflow."""
    norms: Tensor = torch.linalg.vector_norm(W, dim=-2, keepdim=True, dtype=torch.float64)
    return norms.to(W.dtype)
