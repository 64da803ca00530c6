"""Makes the param groups of a model: role, layout and options of its parameters, as values for a ``state_dict``.

:func:`spectrim.describe` shows the result.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
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
# The options of the named optimizers, which an override may set for some parameters.
_OPTIONS = (
    *("lr", "betas", "eps", "momentum", "nesterov", "alpha", "slow_warmup_steps", "gamma", "adamw_betas"),
    *("rank_ratio", "power_steps", "scale", "orthogonalize_steps", "clip", "pre_clip", "shrink"),
    *SpectralOptions.__annotations__,
)


def param_groups(
    model: nn.Module,
    *,
    embedding_lr: float = 1.0,
    head_lr: float = 1.0,
    no_decay: Sequence[Role] = (),
    split: Mapping[str, Split] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Group a model's trainable parameters by role, ready for an optimizer.

    Args:
        model: any module; models of transformers and PEFT are known in detail. Wrappers (DDP, FSDP2, ``torch.compile``,
            activation checkpointing) are unwrapped; flat shards of FSDP1 and DeepSpeed ZeRO are refused.
        embedding_lr: factor on the learning rate of embeddings.
        head_lr: factor on the learning rate of output heads. A head tied to an embedding counts as embedding.
        no_decay: roles without weight decay besides vectors, such as ("embedding", "head"), which the authors of
            SPECTRA do not decay (arXiv 2603.14315). An override of ``weight_decay`` wins.
        split: name pattern -> sizes along the outputs, for fused projections that the library does not know. It
            applies to matrices only, not to biases. If the projections' rows alternate, give "interleaved" and then
            the number of rows of each projection in one turn.
        overrides: name pattern -> values that replace the detected ones: "role", "layout", "split", "lr_factor",
            "weight_decay", or an optimizer's option such as "clip".

    Returns:
        Groups with "params" as (name, parameter) pairs, "role" (matrix, embedding, head, vector), "layout" (see
        :mod:`layout`), "split" (sizes along the outputs, or None), "lr_factor" (factor on the optimizer's lr), "name"
        (its role, numbered where there are several) and "weight_decay" 0 for vectors and the roles of ``no_decay``.
        Every trainable parameter is in exactly one group, a tied one under its first name.

    Raises:
        ValueError: a trainable parameter is flattened, complex or quantised, or its role is unknown; a pattern matches
            nothing; or a value does not fit. The message names it.

    Patterns are globs over full names ("*" also matches dots); the first pattern that matches wins.
    """
    aliases = _aliases(model)
    splits = _Patterns("split", split or {}, aliases)
    declared = _Patterns("overrides", overrides or {}, aliases)
    for pattern, override in declared.values.items():
        _check_keys(override, pattern)
    if isinstance(no_decay, str) or not set(no_decay) <= set(ROLES):
        raise ValueError(f"no_decay={no_decay!r}: expected a sequence of roles, of {_listed(ROLES)}")
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
        values = _values(reading, override, lr_factors, {"vector", *no_decay})
        groups.setdefault(repr(sorted(values.items())), {"params": [], **values})["params"].append((name, parameter))
    if unread:
        raise _unknown_roles(unread)
    _name(groups.values())
    return list(groups.values())


def _unknown_roles(unread: Sequence[str]) -> ValueError:
    """The error that lists parameters, each with its shape, whose roles must be declared."""
    example = f'overrides={{"{unread[0].split()[0]}": {{"role": "matrix"}}}}'
    choices = f"Declare it, for example by {example}; roles: {_listed(ROLES)}"
    return ValueError(f"unknown role of the parameters {', '.join(unread)}. {choices}")


def _name(groups: Iterable[dict[str, Any]]) -> None:
    """Name every group by its role, with a number from the second group of a role on. Loggers show these names."""
    counts: Counter[str] = Counter()
    for group in groups:
        counts[group["role"]] += 1
        number = counts[group["role"]]
        group["name"] = group["role"] if number == 1 else f"{group['role']}-{number}"


def _values(
    reading: Reading, override: Mapping[str, Any], lr_factors: Mapping[str, float], no_decay: Collection[str]
) -> dict[str, Any]:
    """The values of a parameter's group."""
    return {
        "role": reading.role,
        "layout": reading.layout,
        "split": reading.split,
        "lr_factor": lr_factors.get(reading.role, 1.0),
        **({"weight_decay": 0.0} if reading.role in no_decay else {}),
        **{key: value for key, value in override.items() if key not in ("role", "layout", "split")},
    }


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check_dtype(name: str, parameter: nn.Parameter) -> None:
    """Raise ValueError for complex and quantised weights that are trained."""
    if parameter.dtype in _DTYPES:
        return
    if parameter.is_complex():
        what, instead = "complex", "use a real parameter and torch.view_as_complex"
    else:
        what, instead = "quantised", "train an adapter beside it"
    raise ValueError(
        f"parameter {name!r} is {what} ({parameter.dtype}), expected one of {', '.join(map(str, _DTYPES))}: {instead}, "
        f"or freeze it"
    )


Value = TypeVar("Value")


class _Patterns(Generic[Value]):
    """Values by name pattern. The first matching pattern wins, and every pattern must match a parameter."""

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
        """The value of the first pattern that matches any of a parameter's names, or None."""
        for pattern, value in self.values.items():
            if any(fnmatchcase(alias, pattern) for alias in self._aliases[name]):
                return value
        return None

    def must_match_a_matrix(self, readings: Mapping[str, Reading | None]) -> None:
        """Raise ValueError for a pattern that matches vectors only."""
        for pattern in self.values:
            matched = self._matched(pattern)
            if all((reading := readings[name]) is not None and reading.layout == "vector" for name in matched):
                raise ValueError(f"{self.argument} pattern {pattern!r} matches vectors only: {_listed(matched)}")

    def _matched(self, pattern: str) -> list[str]:
        return [name for name, names in self._aliases.items() if any(fnmatchcase(alias, pattern) for alias in names)]


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """The first name of every parameter -> all of its names; tied parameters have several."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"parameter {name!r} has no shape yet: run the model once before grouping its parameters")
        names.setdefault(parameter, []).append(name)
    return {found[0]: found for found in names.values()}


def _declared(
    reading: Reading | None, override: Mapping[str, Any], split: Split | None, shape: tuple[int, ...], name: str
) -> Reading | None:
    """The detected reading with the declared values in place; None if the role is unknown."""
    role = override.get("role", reading.role if reading else None)
    if role is None:
        return None
    layout = override.get("layout", _layout_for(role, reading, shape))
    if role not in ROLES:
        raise ValueError(f"role={role!r} for {name!r}: expected one of {_listed(ROLES)}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} for {name!r}: expected one of {_listed(LAYOUTS)}")
    if (role == "vector") != (layout == "vector"):
        raise ValueError(f"layout={layout!r} with role={role!r} for {name!r}: only vectors have the layout 'vector'")
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
    """The layout of a parameter whose role was declared without a layout."""
    if role == "vector":
        return "vector"
    if reading is not None and reading.layout != "vector":
        return reading.layout
    return "flatten" if len(shape) > 3 else default_layout(shape)


def _sizes(split: object, name: str) -> tuple[int | str, ...]:
    """Check a split, and convert it to a tuple."""
    found = tuple(split) if isinstance(split, Sequence) and not isinstance(split, str) else ()
    sizes = found[1:] if found[:1] == (INTERLEAVED,) else found
    if not sizes or not all(type(size) is int for size in sizes):
        raise ValueError(
            f"split={split!r} for {name!r}: expected sizes along the outputs, such as (768, 768, 768), or the sizes "
            f'of one turn, such as ("interleaved", 256, 64, 64)'
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
