"""Parameter groups of a model: what every parameter is, as plain values that a ``state_dict`` can carry.

:func:`param_groups` reads the model by :mod:`reading`, applies what the caller declared, and gathers the parameters
that share all values. :func:`spectrim.describe` shows the result.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Generic, TypeVar, cast

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from spectrim.optim.grouping.flat_shards import check_whole
from spectrim.optim.grouping.layout import INTERLEAVED, LAYOUTS, Layout, Split, default_layout, matrix_shapes
from spectrim.optim.grouping.options import SpectralOptions
from spectrim.optim.grouping.reading import read_model
from spectrim.optim.grouping.roles import ROLES, Reading, Role

__all__ = ["param_groups"]

_GROUPING = ("role", "layout", "split", "lr_factor", "weight_decay")
# The options of the named optimizers, each of which an override may set for some parameters.
_OPTIONS = (
    *("lr", "betas", "eps", "momentum", "nesterov", "alpha", "slow_warmup_steps", "rank_ratio", "scale"),
    *("orthogonalize_steps", "clip", "pre_clip", "shrink"),
    *SpectralOptions.__annotations__,
)


def param_groups(
    model: nn.Module,
    *,
    embedding_lr: float = 1.0,
    head_lr: float = 1.0,
    split: Mapping[str, Split] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Group a model's trainable parameters by what they are, ready for an optimizer.

    Args:
        model: any module; models of transformers and PEFT are known in detail. Wrappers (DDP, FSDP2, ``torch.compile``,
            activation checkpointing) are looked through; flat shards of FSDP1 and DeepSpeed ZeRO are refused.
        embedding_lr: factor on the learning rate of embeddings.
        head_lr: factor on the learning rate of output heads. A weight tied to an embedding is an embedding.
        split: pattern of names -> sizes along the outputs, for fused projections that the library does not know. It
            applies to the matrices that the pattern matches, not to biases. Where the outputs of the projections take
            turns, "interleaved" and then how many of each come at a time.
        overrides: pattern of names -> values that replace what was read: "role", "layout", "split", "lr_factor",
            "weight_decay", or an optimizer's option such as "clip".

    Returns:
        Groups with "params" as (name, parameter) pairs, "role" (matrix, embedding, head, vector), "layout" (see
        :mod:`layout`), "split" (sizes along the outputs, or None), "lr_factor" (factor on the optimizer's lr), "name"
        (its role, numbered where there are several) and, for vectors, "weight_decay" 0. Every trainable parameter is in
        exactly one group, a tied one under its first name.

    Raises:
        ValueError: a trainable parameter that is flattened, complex or quantised, or whose role cannot be told, a
            pattern that matches nothing, or a value that does not fit; the message names it.

    Patterns are globs over whole names ("*" matches any characters, dots too); the first that matches wins.
    """
    aliases = _aliases(model)
    splits = _Patterns("split", split or {}, aliases)
    declared = _Patterns("overrides", overrides or {}, aliases)
    for pattern, override in declared.values.items():
        _check_keys(override, pattern)
    lr_factors = {"embedding": _factor("embedding_lr", embedding_lr), "head": _factor("head_lr", head_lr)}

    groups: dict[str, dict[str, Any]] = {}
    unread: list[str] = []
    readings = read_model(model)
    splits.must_match_a_matrix(readings)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        check_whole(parameter, f"parameter {name!r}")
        _check_dtype(name, parameter)
        shape = tuple(parameter.shape)
        override = declared.first(name) or {}
        reading = _declared(readings[name], override, splits.first(name), shape, name)
        if reading is None:
            unread.append(f"{name} {shape}")
            continue
        values = {
            "role": reading.role,
            "layout": reading.layout,
            "split": reading.split,
            "lr_factor": lr_factors.get(reading.role, 1.0),
            **({"weight_decay": 0.0} if reading.role == "vector" else {}),
            **{key: value for key, value in override.items() if key not in ("role", "layout", "split")},
        }
        group = groups.setdefault(repr(sorted(values.items())), {"params": [], **values})
        group["params"].append((name, parameter))
    if unread:
        example = f'overrides={{"{unread[0].split()[0]}": {{"role": "matrix"}}}}'
        raise ValueError(
            f"cannot tell what these parameters are: {', '.join(unread)}. Declare them, "
            f"for example by {example}; roles: {_listed(ROLES)}"
        )
    _name(groups.values())
    return list(groups.values())


def _name(groups: Iterable[dict[str, Any]]) -> None:
    """Call every group by its role, and a number from the second of a role on: learning rates are logged by name."""
    counts: Counter[str] = Counter()
    for group in groups:
        counts[group["role"]] += 1
        number = counts[group["role"]]
        group["name"] = group["role"] if number == 1 else f"{group['role']}-{number}"


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check_dtype(name: str, parameter: nn.Parameter) -> None:
    """Refuse complex and quantised weights; frozen ones never come here."""
    if parameter.dtype in _DTYPES:
        return
    if parameter.is_complex():
        what, instead = "complex", "hold it as a real parameter and read that by torch.view_as_complex"
    else:
        what, instead = "quantised", "train an adapter beside it"
    raise ValueError(
        f"parameter {name!r} is {what} ({parameter.dtype}), expected one of {', '.join(map(str, _DTYPES))}: {instead}, "
        f"or freeze it"
    )


Value = TypeVar("Value")


class _Patterns(Generic[Value]):
    """Values by pattern of names; the first pattern that matches wins, and every pattern must match something."""

    def __init__(self, argument: str, values: Mapping[str, Value], aliases: Mapping[str, Sequence[str]]) -> None:
        self.argument = argument
        self.values = values
        self._aliases = aliases
        for pattern in values:
            if not self._matched(pattern):
                known = [name for names in aliases.values() for name in names]
                close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3)
                hint = f"; close names: {_listed(close)}" if close else ""
                raise ValueError(f"{argument} pattern {pattern!r} matches no parameter{hint}")

    def first(self, name: str) -> Value | None:
        """The value of the first pattern that matches a parameter under any of its names, or None."""
        for pattern, value in self.values.items():
            if any(fnmatchcase(alias, pattern) for alias in self._aliases[name]):
                return value
        return None

    def must_match_a_matrix(self, readings: Mapping[str, Reading | None]) -> None:
        """Refuse a pattern all of whose parameters are vectors."""
        for pattern in self.values:
            matched = self._matched(pattern)
            if all((reading := readings[name]) is not None and reading.layout == "vector" for name in matched):
                raise ValueError(f"{self.argument} pattern {pattern!r} matches vectors only: {_listed(matched)}")

    def _matched(self, pattern: str) -> list[str]:
        return [name for name, names in self._aliases.items() if any(fnmatchcase(alias, pattern) for alias in names)]


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """The first name of every parameter, with all of its names."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"parameter {name!r} has no shape yet: run the model once before grouping its parameters")
        names.setdefault(parameter, []).append(name)
    return {found[0]: found for found in names.values()}


def _declared(
    reading: Reading | None,
    override: Mapping[str, Any],
    split: Split | None,
    shape: tuple[int, ...],
    name: str,
) -> Reading | None:
    """The reading with what was declared in place of what was read; None if nothing tells the parameter's role."""
    role = override.get("role", reading.role if reading else None)
    if role is None:
        return None
    layout = override.get("layout", _layout_for(role, reading, shape))
    if role not in ROLES:
        raise ValueError(f"role={role!r} for {name!r}: expected one of {_listed(ROLES)}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} for {name!r}: expected one of {_listed(LAYOUTS)}")
    if (role == "vector") != (layout == "vector"):
        raise ValueError(f"layout={layout!r} with role={role!r} for {name!r}: vectors alone have the layout 'vector'")
    sizes = reading.split if reading is not None and reading.layout == layout else None
    if split is not None and layout != "vector":
        sizes = _sizes(split, name)
    if "split" in override:
        sizes = _sizes(override["split"], name) if override["split"] is not None else None
    if layout == "vector" and sizes is not None:
        raise ValueError(f"split={sizes} for {name!r}: a vector has no outputs to split")
    try:
        matrix_shapes(shape, cast(Layout, layout), sizes)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None
    return Reading(cast(Role, role), cast(Layout, layout), sizes)


def _layout_for(role: str, reading: Reading | None, shape: tuple[int, ...]) -> Layout:
    """The layout of a parameter whose role was declared without one."""
    if role == "vector":
        return "vector"
    if reading is not None and reading.layout != "vector":
        return reading.layout
    return "flatten" if len(shape) > 3 else default_layout(shape)


def _sizes(split: object, name: str) -> tuple[int | str, ...]:
    """A split as plain values."""
    found = tuple(split) if isinstance(split, Sequence) and not isinstance(split, str) else ()
    sizes = found[1:] if found[:1] == (INTERLEAVED,) else found
    if not sizes or not all(type(size) is int for size in sizes):
        raise ValueError(
            f"split={split!r} for {name!r}: expected sizes along the outputs, such as (768, 768, 768), or of one turn, "
            f'such as ("interleaved", 256, 64, 64)'
        )
    return found


def _check_keys(override: Mapping[str, Any], pattern: str) -> None:
    for key in override:
        if key not in _GROUPING and key not in _OPTIONS:
            raise ValueError(
                f"unknown key {key!r} in overrides[{pattern!r}]: "
                f"expected one of {_listed(_GROUPING)}, or an optimizer's option: {_listed(sorted(_OPTIONS))}"
            )


def _factor(argument: str, value: float) -> float:
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{argument}={value!r}: expected a finite factor of at least 0")
    return float(value)


def _listed(choices: Iterable[str]) -> str:
    return ", ".join(map(repr, choices))
