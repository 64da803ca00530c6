"""Parameter groups of a model: what every parameter is, as plain values that a ``state_dict`` can carry.

:func:`param_groups` reads the model by :mod:`reading`, applies what the caller declared, and gathers the parameters
that share all values. Relied on by every optimizer; :mod:`describe` shows the result.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import nn
from torch.nn.parameter import UninitializedParameter

from spectrim.optim.describe import describe
from spectrim.optim.layout import LAYOUTS, Layout, default_layout, matrix_shapes
from spectrim.optim.options import SpectralOptions
from spectrim.optim.reading import read_model
from spectrim.optim.roles import ROLES, Reading

__all__ = ["describe", "param_groups"]

# The optimizer options that an override may set besides the values of grouping itself.
_OPTIONS = (
    *("lr", "betas", "eps", "momentum", "nesterov", "scale", "rank_ratio", "clip", "clip_form", "pre_clip", "shrink"),
    *SpectralOptions.__annotations__,
)
_GROUPING = ("role", "layout", "split", "lr_scale", "weight_decay")


def param_groups(
    model: nn.Module,
    *,
    embedding_lr: float = 1.0,
    head_lr: float = 1.0,
    split: Mapping[str, Sequence[int]] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Group a model's trainable parameters by what they are, ready for an optimizer.

    Args:
        model: any module; models of transformers and PEFT are known in detail. Wrappers (DDP, FSDP, ``torch.compile``,
            activation checkpointing) are looked through.
        embedding_lr: factor on the learning rate of embeddings.
        head_lr: factor on the learning rate of output heads. A weight tied to an embedding is an embedding.
        split: pattern of names -> sizes along the outputs, for fused projections that the library does not know.
        overrides: pattern of names -> values that replace what was read: "role", "layout", "split", "lr_scale",
            "weight_decay", or an optimizer's option such as "clip". The first pattern that matches wins.

    Returns:
        Groups with "params" as (name, parameter) pairs, "role" (matrix, embedding, head, vector), "layout" (see
        :mod:`layout`), "split" (sizes along the outputs, or None), "lr_scale" (factor on the optimizer's lr) and, for
        vectors, "weight_decay" 0. Every trainable parameter is in exactly one group, a tied one under its first name.

    Raises:
        ValueError: a parameter whose role cannot be told, a pattern that matches nothing, or a value that does not fit.

    Patterns are globs over whole names: "*" matches any characters, dots too.
    """
    names = _names_by_parameter(model)
    readings = read_model(model)
    declared_splits = _Patterns("split", split or {}, names.values())
    declared = _Patterns("overrides", overrides or {}, names.values())
    lr_scales = {"embedding": float(embedding_lr), "head": float(head_lr)}

    groups: dict[str, dict[str, Any]] = {}
    unread: list[str] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"parameter {name!r} has no shape yet: run the model once before grouping its parameters")
        override = dict(declared.first(names[parameter]) or {})
        _check_keys(override, name)
        reading = _declare(readings[name], override, tuple(parameter.shape), name)
        if reading is None:
            unread.append(f"{name} {tuple(parameter.shape)}")
            continue
        sizes = declared_splits.first(names[parameter])
        if sizes is not None and reading.layout != "vector":
            reading = Reading(reading.role, reading.layout, tuple(sizes))
        _check_fit(reading, tuple(parameter.shape), name)
        values = {
            "role": reading.role,
            "layout": reading.layout,
            "split": reading.split,
            "lr_scale": lr_scales.get(reading.role, 1.0),
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
    return list(groups.values())


def _names_by_parameter(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Every parameter with all of its names; patterns may use any of them."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


class _Patterns:
    """Values by pattern of names; the first pattern that matches wins, and every pattern must match something."""

    def __init__(self, argument: str, values: Mapping[str, Any], names: Iterable[Sequence[str]]) -> None:
        self._values = values
        known = [name for aliases in names for name in aliases]
        for pattern in values:
            if not any(fnmatchcase(name, pattern) for name in known):
                close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3)
                hint = f"; close names: {_listed(close)}" if close else ""
                raise ValueError(f"{argument} pattern {pattern!r} matches no parameter{hint}")

    def first(self, names: Sequence[str]) -> Any:
        """The value of the first pattern that matches one of a parameter's names, or None."""
        for pattern, value in self._values.items():
            if any(fnmatchcase(name, pattern) for name in names):
                return value
        return None


def _declare(reading: Reading | None, override: Mapping[str, Any], shape: tuple[int, ...], name: str) -> Reading | None:
    """The reading with the declared role, layout and split in place of what was read."""
    role = override.get("role", reading.role if reading else None)
    if role is None:
        return None
    if role not in ROLES:
        raise ValueError(f"role={role!r} for {name!r}: expected one of {_listed(ROLES)}")
    layout = override.get("layout")
    if layout is None:
        layout = _layout_for(role, reading, shape)
    elif layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} for {name!r}: expected one of {_listed(LAYOUTS)}")
    split = override.get("split", reading.split if reading and reading.layout == layout else None)
    return Reading(role, cast(Layout, layout), tuple(split) if split is not None else None)


def _layout_for(role: str, reading: Reading | None, shape: tuple[int, ...]) -> Layout:
    if role == "vector":
        return "vector"
    if reading is not None and reading.layout != "vector":
        return reading.layout
    return "flatten" if len(shape) > 3 else default_layout(shape)


def _check_keys(override: Mapping[str, Any], name: str) -> None:
    for key in override:
        if key not in _GROUPING and key not in _OPTIONS:
            raise ValueError(
                f"unknown key {key!r} in the override of {name!r}: "
                f"expected one of {_listed(_GROUPING)}, or an optimizer's option: {_listed(sorted(_OPTIONS))}"
            )


def _check_fit(reading: Reading, shape: tuple[int, ...], name: str) -> None:
    if (reading.role == "vector") != (reading.layout == "vector"):
        raise ValueError(
            f"role={reading.role!r} with layout={reading.layout!r} for {name!r}: only vectors have no matrices"
        )
    if reading.layout == "vector" and reading.split is not None:
        raise ValueError(f"split={reading.split} for {name!r}: a vector has no outputs to split")
    try:
        matrix_shapes(shape, reading.layout, reading.split)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None


def _listed(choices: Iterable[str]) -> str:
    return ", ".join(map(repr, choices))
