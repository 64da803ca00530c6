"""Clip gradients spectrally or shrink their large entries in place, in a training loop with any optimizer.

Use these like :func:`torch.nn.utils.clip_grad_norm_`; the options ``pre_clip`` and ``shrink`` of the optimizers do the
same. Call them before the global norm is clipped, so that the norm is not dominated by the spikes that they remove. ::

    loss.backward()
    norms = clip_grad_spectral_(groups, 0.1)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from spectrim.distributed.dtensor import is_dtensor
from spectrim.operators import DEFAULT_SHRINK_FACTOR, DEFAULT_SHRINK_FORM, ShrinkForm, entry_scale
from spectrim.optim.gradients.matrices import Clipping, shrink_entries, squared_norm
from spectrim.optim.gradients.shard_gradients import clip_shards, shrink_shards
from spectrim.optim.grouping.flat_shards import check_whole
from spectrim.optim.grouping.groups import param_groups
from spectrim.optim.grouping.layout import matrices
from spectrim.optim.rules.rule import UNSHRUNK_ROLES, Rule, Shrink
from spectrim.optim.screening.agreement import any_rank
from spectrim.optim.screening.shard_screening import screen_shards
from spectrim.optim.sharded.entry import ShardedEntry, laid_like, sharded_entry
from spectrim.optim.stepping.entries import Entry, parameter_name, role_and_layout, whole_entry

__all__ = ["Parameters", "Shrunk", "clip_grad_spectral_", "clip_gradients", "shrink_grad_"]

Parameters = Tensor | nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class Shrunk(NamedTuple):
    """The result of :func:`shrink_grad_`: one number for each parameter that has a gradient, in order.

    Attributes:
        scales: the entry scale before shrinking, averaged over the parameter's matrices.
        removed: the share of the squared norm that was removed. Both are zero for gradients that are not shrunk.
    """

    scales: Tensor
    removed: Tensor


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
    return clip_gradients(parameters, Clipping(form, threshold, vectors), error_if_nonfinite=error_if_nonfinite)


def clip_gradients(parameters: Parameters, clipping: Clipping, *, error_if_nonfinite: bool = False) -> Tensor:
    """:func:`clip_grad_spectral_` with checked options, which may leave out the measurement."""
    groups = _groups(parameters)
    entries = _entries(groups)
    shards = _screened(entries)
    finite = _finite(groups, entries, error_if_nonfinite)
    found = clip_shards(shards, clipping)
    norms = []
    for entry, flag in zip(entries, finite, strict=True):
        if isinstance(entry, ShardedEntry):
            if entry.has_gradient:
                norms.append(torch.where(flag, found[entry], torch.inf))
            continue
        # Operators get zeros instead of a gradient that is not finite.
        norm, clipped = clipping.clipped(torch.where(flag, entry.grad, 0), entry.layout, entry.split)
        norms.append(torch.where(flag, norm, torch.inf))
        if clipped is not None:
            entry.grad.copy_(torch.where(flag, clipped, entry.grad))
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
    shrink = Shrink(DEFAULT_SHRINK_FACTOR if factor == "auto" else float(factor), form, "gradient")
    groups = _groups(parameters)
    entries = _entries(groups, shrink)
    shards = [shard for shard in _screened(entries) if shard.shares_scales]
    finite = _finite(groups, entries, error_if_nonfinite)
    found = shrink_shards(shards, shrink)
    for entry, flag in zip(entries, finite, strict=True):
        if entry.rule.shrink is None:
            zero = torch.zeros((), device=entry.grad.device)
            found[entry] = zero, zero
        elif not isinstance(entry, ShardedEntry):
            found[entry] = _shrink_whole(entry, flag, shrink)
    numbers = [
        [torch.where(flag, number, 0) for number in found[entry]]
        for entry, flag in zip(entries, finite, strict=True)
        if not isinstance(entry, ShardedEntry) or entry.has_gradient
    ]
    return Shrunk(_gathered([scale for scale, _ in numbers]), _gathered([removed for _, removed in numbers]))


def _shrink_whole(entry: Entry, flag: Tensor, shrink: Shrink) -> tuple[Tensor, Tensor]:
    """Shrink a gradient unless the flag is False; returns its mean entry scale and the share of energy removed."""
    exact = torch.where(flag, entry.grad, 0)
    wide = exact.to(torch.promote_types(exact.dtype, torch.float32))
    shrunk = shrink_entries(wide, shrink, entry.layout, entry.split)
    entry.grad.copy_(torch.where(flag, shrunk, entry.grad))
    views = matrices(exact.contiguous(), entry.layout, entry.split) or [exact.reshape(-1)]
    before, after = squared_norm(exact), squared_norm(shrunk)
    scale = torch.cat([entry_scale(view).reshape(-1) for view in views]).mean()
    return scale, torch.where(before > 0, 1 - after / before, 0)


def _entries(groups: Sequence[Mapping[str, Any]], shrink: Shrink | None = None) -> list[Entry]:
    """All gradients, whose rules have the shrinkage if they are shrunk; and all shards: other ranks may have more."""
    entries: list[Entry] = []
    for group_index, group in enumerate(groups):
        for index, parameter in enumerate(group["params"]):
            position = (group_index, index)
            name = parameter_name(groups, position)
            check_whole(parameter, repr(name))
            grad, sharded = parameter.grad, is_dtensor(parameter)
            if grad is None and not (sharded and parameter.requires_grad):
                continue
            if grad is not None and (grad.is_sparse or not grad.is_floating_point()):
                raise ValueError(f"the gradient of {name!r} is sparse or not real: expected a dense, real one")
            role, layout = role_and_layout(group, parameter)
            rule = Rule(vector=layout == "vector", shrink=None if role in UNSHRUNK_ROLES else shrink)
            if not sharded:
                entries.append(whole_entry(parameter, group, position, name, {}, rule))
                continue
            shard = sharded_entry(parameter, group, position, name, {}, rule)
            shard.shares_scales = rule.shrink is not None
            laid = parameter.placements, parameter.device_mesh
            if grad is not None and (grad.placements, grad.device_mesh) != laid:
                # The entry holds a redistributed copy. Make it the gradient, so that writes reach the parameter.
                parameter.grad = laid_like(parameter, shard.grad)
            entries.append(shard)
    return entries


def _screened(entries: Sequence[Entry]) -> list[ShardedEntry]:
    """The entries of sharded gradients, screened together with the other ranks."""
    shards = [entry for entry in entries if isinstance(entry, ShardedEntry)]
    if shards:
        values = {shard: squared_norm(shard.grad) for shard in shards}
        screen_shards(shards, values, torch.zeros((), device=shards[0].grad.device), None)
    return shards


def _groups(parameters: Parameters) -> Sequence[Mapping[str, Any]]:
    """Groups with names apart from parameters."""
    if isinstance(parameters, nn.Module):
        groups: list[Any] = param_groups(parameters)
    elif isinstance(parameters, Tensor):
        groups = [{"params": [parameters]}]
    else:
        items: list[Any] = list(parameters)
        groups = items if items and isinstance(items[0], Mapping) else [{"params": items}]
    return [_with_names(group) for group in groups]


def _with_names(group: Mapping[str, Any]) -> Mapping[str, Any]:
    items = list(group["params"])
    if not any(isinstance(item, tuple) for item in items):
        return group
    return {**group, "params": [p for _, p in items], "param_names": [name for name, _ in items]}


def _finite(groups: Sequence[Mapping[str, Any]], entries: Sequence[Entry], error_if_nonfinite: bool) -> list[Tensor]:
    """For each gradient a flag on the device: True if it is finite."""
    finite = [_energy(entry).isfinite() for entry in entries]
    if error_if_nonfinite:
        bad = [entry for entry, flag in zip(entries, finite, strict=True) if not flag]
        # All ranks raise together; otherwise the others would wait for the one that raised.
        if any_rank([entry for entry in entries if isinstance(entry, ShardedEntry)], bool(bad)):
            which = (
                f"the gradient of {parameter_name(groups, bad[0].position)!r}" if bad else "a gradient of another rank"
            )
            raise RuntimeError(
                f"{which} is not finite; no gradient was changed. error_if_nonfinite=False changes only the finite ones"
            )
    return finite


def _energy(entry: Entry) -> Tensor:
    if not isinstance(entry, ShardedEntry):
        return squared_norm(entry.grad)
    assert entry.total is not None
    return entry.total


def _gathered(numbers: Sequence[Tensor]) -> Tensor:
    if not numbers:
        return torch.zeros(0)
    return torch.stack([number.to(device=numbers[0].device, dtype=torch.float32) for number in numbers])
