"""Clip gradients spectrally or shrink their large entries in place, in a training loop with any optimizer.

Use these like :func:`torch.nn.utils.clip_grad_norm_`; the options ``pre_clip`` and ``shrink`` of the optimizers do the
same. Call them before the global norm is clipped, so that the norm is not dominated by the spikes that they remove. ::

    loss.backward()
    norms = clip_grad_spectral_(groups, 0.1)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from spectrim.distributed.dtensor import is_dtensor
from spectrim.operators import DEFAULT_SHRINK_FACTOR, DEFAULT_SHRINK_FORM, ShrinkForm, entry_scale, hard_clip, soft_clip
from spectrim.optim.gradients.matrices import clipped_vector, map_matrices, shrink_entries, squared_norm
from spectrim.optim.gradients.norms import largest_singular_value
from spectrim.optim.gradients.shard_gradients import clip_shards, shrink_shards
from spectrim.optim.grouping.flat_shards import check_whole
from spectrim.optim.grouping.groups import param_groups
from spectrim.optim.grouping.layout import Layout, Split, matrices
from spectrim.optim.rules.rule import given_rule
from spectrim.optim.screening.agreement import any_rank
from spectrim.optim.screening.shard_screening import screen_shards
from spectrim.optim.sharded.entry import ShardedEntry, laid_like, sharded_entry
from spectrim.optim.stepping.entries import role_and_layout

__all__ = ["Parameters", "Shrunk", "clip_grad_spectral_", "shrink_grad_"]

Parameters = Tensor | nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


#: Roles that are not shrunk: their rows belong to tokens, whose frequencies differ by orders of magnitude.
_UNSHRUNK = ("embedding", "head")


class Shrunk(NamedTuple):
    """The result of :func:`shrink_grad_`: one number for each parameter that has a gradient, in order.

    Attributes:
        scales: the entry scale before shrinking, averaged over the parameter's matrices.
        removed: the share of the squared norm that was removed. Both are zero for gradients that are not shrunk.
    """

    scales: Tensor
    removed: Tensor


class _Gradient(NamedTuple):
    """One gradient with its layout. For a sharded gradient, ``grad`` is this rank's shard and ``shard`` its entry."""

    name: str
    grad: Tensor
    role: str
    layout: Layout
    split: Split | None
    shard: ShardedEntry | None = None


@torch.no_grad()
def clip_grad_spectral_(
    parameters: Parameters,
    threshold: float | Tensor,
    *,
    form: Literal["soft", "hard"] = "soft",
    vectors: bool = False,
    error_if_nonfinite: bool = False,
) -> Tensor:
    r"""Clip the singular values σ of every gradient matrix in place, to σ / sqrt(1 + σ²/c²).

    Args:
        parameters: a tensor; an iterable of parameters or of (name, parameter) pairs, where 2-D and 3-D parameters are
            matrices and all others vectors; groups of :func:`spectrim.param_groups` or of an optimizer, whose layouts
            are used; or a module, whose parameters are grouped at every call.
        threshold: c > 0, in the units of the gradients' singular values; a scalar tensor is not checked.
        form: "soft" as above; "hard" lowers singular values above c to c and leaves the others untouched.
        vectors: also clip vectors by their norm.
        error_if_nonfinite: raise if a gradient is not finite, which reads the device. Otherwise such a gradient is
            left as it is.

    Returns:
        The largest singular value of each gradient before clipping, one number for each parameter that has a gradient,
        in order; for vectors the norm, clipped or not. It is estimated by power steps, at most 2 % too low, and is not
        finite if the gradient is not. The tensor is on the first gradient's device, which is not read.

    Raises:
        ValueError: threshold is not positive, or the form is unknown.
        RuntimeError: a gradient is not finite; the message names it. No gradient is changed then.

    Call it on every rank if parameters are sharded: matrices are sent to owner ranks and back. A rank without a
    gradient for a parameter gets no number for it. Source: arXiv 2603.14315, whose pre-clipping uses c = 0.1.
    """
    if not isinstance(threshold, Tensor) and not threshold > 0:
        raise ValueError(f"threshold={threshold}: expected a positive number")
    if form not in ("soft", "hard"):
        raise ValueError(f"form={form!r}: expected one of 'soft', 'hard'")
    clip = soft_clip if form == "soft" else hard_clip
    gradients = list(_gradients(parameters))
    shards = _screened(gradients)
    finite = _finite(gradients, error_if_nonfinite)
    found = clip_shards(shards, clip, threshold, form=form, vectors=vectors)
    norms = []
    for gradient, flag in zip(gradients, finite, strict=True):
        if gradient.shard is not None:
            if gradient.shard.has_gradient:
                norms.append(torch.where(flag, found[gradient.shard], torch.inf))
            continue
        # Operators get zeros instead of a gradient that is not finite.
        exact = torch.where(flag, gradient.grad, 0)
        norms.append(torch.where(flag, largest_singular_value(exact, gradient.layout, gradient.split), torch.inf))
        if gradient.layout != "vector":
            clipped = map_matrices(lambda G: clip(G, threshold), exact, gradient.layout, gradient.split)
        elif vectors:
            clipped = clipped_vector(exact, squared_norm(exact).sqrt(), threshold, form)
        else:
            continue
        gradient.grad.copy_(torch.where(flag, clipped, gradient.grad))
    return _gathered(norms)


@torch.no_grad()
def shrink_grad_(
    parameters: Parameters,
    factor: float | Literal["auto"] = "auto",
    *,
    form: ShrinkForm = DEFAULT_SHRINK_FORM,
    error_if_nonfinite: bool = False,
) -> Shrunk:
    """Shrink, in place, the entries of every gradient that are large against the entry scale of its matrix.

    Args:
        parameters: as for :func:`clip_grad_spectral_`. Vectors are shrunk too. Embeddings and heads are not, if groups
            or a module identify them: their rows belong to tokens, whose frequencies differ by orders of magnitude, so
            rows of frequent tokens would count as outliers.
        factor: τ divided by the entry scale; "auto" for the default factor.
        form: see :func:`spectrim.smooth_shrink`.
        error_if_nonfinite: as for :func:`clip_grad_spectral_`.

    Returns:
        Scales and shares of energy removed, on the first gradient's device, which is not read.

    Raises:
        ValueError: the factor is not positive, or the form is unknown.
        RuntimeError: a gradient is not finite; the message names it. No gradient is changed then.

    Call it on every rank if parameters are sharded. Source: arXiv 2605.27733.
    """
    if factor != "auto" and not factor > 0:
        raise ValueError(f'factor={factor}: expected a positive number or "auto"')
    number = DEFAULT_SHRINK_FACTOR if factor == "auto" else float(factor)
    gradients = list(_gradients(parameters))
    for gradient in gradients:
        if gradient.shard is not None:
            gradient.shard.shares_scales = gradient.role not in _UNSHRUNK
    shards = [shard for shard in _screened(gradients) if shard.shares_scales]
    finite = _finite(gradients, error_if_nonfinite)
    found = shrink_shards(shards, number, form)
    scales: list[Tensor] = []
    removed: list[Tensor] = []
    for gradient, flag in zip(gradients, finite, strict=True):
        if gradient.shard is not None and not gradient.shard.has_gradient:
            continue
        if gradient.shard in found:
            for listed, of_shard in zip((scales, removed), found[gradient.shard], strict=True):
                listed.append(torch.where(flag, of_shard, 0))
            continue
        if gradient.role in _UNSHRUNK:
            scales.append(torch.zeros((), device=gradient.grad.device))
            removed.append(scales[-1])
            continue
        exact = torch.where(flag, gradient.grad, 0)
        wide = exact.to(torch.promote_types(exact.dtype, torch.float32))
        shrunk = shrink_entries(wide, number, form, gradient.layout, gradient.split)
        views = matrices(exact.contiguous(), gradient.layout, gradient.split) or [exact.reshape(-1)]
        scales.append(torch.cat([entry_scale(view).reshape(-1) for view in views]).mean())
        before, after = squared_norm(exact), squared_norm(shrunk)
        removed.append(torch.where(before > 0, 1 - after / before, 0))
        gradient.grad.copy_(torch.where(flag, shrunk, gradient.grad))
    return Shrunk(_gathered(scales), _gathered(removed))


def _gradients(parameters: Parameters) -> Iterator[_Gradient]:
    """All gradients with their layouts."""
    for group_index, group in enumerate(_groups(parameters)):
        names = group.get("param_names")
        for index, item in enumerate(group["params"]):
            name = names[index] if names else f"group {group_index}, parameter {index}"
            if isinstance(item, tuple):
                name, item = item
            check_whole(item, repr(name))
            sharded = is_dtensor(item)
            if item.grad is None and not (sharded and item.requires_grad):
                continue
            if item.grad is not None and (item.grad.is_sparse or not item.grad.is_floating_point()):
                raise ValueError(f"the gradient of {name!r} is sparse or not real: expected a dense, real one")
            role, layout = role_and_layout(group, item)
            if not sharded:
                yield _Gradient(name, item.grad, role, layout, group.get("split"))
                continue
            # Also without a gradient on this rank: other ranks may have one, and every rank must take part.
            rule = given_rule(vector=layout == "vector")
            shard = sharded_entry(item, group, (group_index, index), name, {}, rule)
            if shard.has_gradient and (item.grad.placements, item.grad.device_mesh) != (
                item.placements,
                item.device_mesh,
            ):
                # The entry holds a redistributed copy. Make it the gradient, so that writes reach the parameter.
                item.grad = laid_like(item, shard.grad)
            yield _Gradient(name, shard.grad, role, layout, shard.split, shard)


def _screened(gradients: Sequence[_Gradient]) -> list[ShardedEntry]:
    """The entries of sharded gradients, screened together with the other ranks."""
    shards = [gradient.shard for gradient in gradients if gradient.shard is not None]
    if shards:
        values = {shard: squared_norm(shard.grad) for shard in shards}
        screen_shards(shards, values, torch.zeros((), device=shards[0].grad.device), None)
    return shards


def _groups(parameters: Parameters) -> Sequence[Mapping[str, Any]]:
    if isinstance(parameters, nn.Module):
        return param_groups(parameters)
    if isinstance(parameters, Tensor):
        return [{"params": [parameters]}]
    items: list[Any] = list(parameters)
    return items if items and isinstance(items[0], Mapping) else [{"params": items}]


def _finite(gradients: Sequence[_Gradient], error_if_nonfinite: bool) -> list[Tensor]:
    """For each gradient a flag on the device: True if it is finite."""
    finite = [_energy(gradient).isfinite() for gradient in gradients]
    if error_if_nonfinite:
        bad = [gradient.name for gradient, flag in zip(gradients, finite, strict=True) if not flag]
        # All ranks raise together; otherwise the others would wait for the one that raised.
        elsewhere = any_rank([gradient.shard for gradient in gradients if gradient.shard is not None], bool(bad))
        if bad or elsewhere:
            which = f"the gradient of {bad[0]!r}" if bad else "a gradient of another rank"
            raise RuntimeError(
                f"{which} is not finite; no gradient was changed. error_if_nonfinite=False changes only the finite ones"
            )
    return finite


def _energy(gradient: _Gradient) -> Tensor:
    if gradient.shard is None:
        return squared_norm(gradient.grad)
    assert gradient.shard.total is not None
    return gradient.shard.total


def _gathered(numbers: Sequence[Tensor]) -> Tensor:
    if not numbers:
        return torch.zeros(0)
    return torch.stack([number.to(device=numbers[0].device, dtype=torch.float32) for number in numbers])
