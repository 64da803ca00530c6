"""The options of a param group: their defaults, their checks, and which of them act on a parameter of a given role."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, TypedDict, cast, get_args

from torch import Tensor

from spectrim.operators import DEFAULT_SHRINK_FORM, ShrinkForm
from spectrim.optim.layout import LAYOUTS
from spectrim.optim.recipe import SCALES
from spectrim.optim.roles import ROLES
from spectrim.optim.schedule import CLIP_DECAYS, ClipDecay

__all__ = [
    "ClipScope",
    "ClippingOptions",
    "SpectralOptions",
    "complete_options",
    "effective_options",
    "finish_group",
    "is_zero",
]

ClipScope = Literal["all", "matrices"]


class ClippingOptions(TypedDict, total=False):
    """Options of whatever clips, each also a value of a param group.

    Attributes:
        clip_scope: "all": every role is clipped. "matrices": embeddings, heads and vectors are not; the recipes of this
            library give them plain AdamW then.
        peak_lr: the learning rate that thresholds refer to; the group's initial one unless given.
        warmup_steps: while the learning rate warms up, threshold times learning rate is constant.
        total_steps: length of training, needed where ``clip_decay`` is not "constant".
        clip_form: "soft" shrinks every singular value σ to σ/√(1+σ²/c²); "hard" only those above c, to c.
        clip_decay: how the threshold falls over the last ``clip_decay_fraction`` of training to ``clip_final`` of
            itself.
        on_nonfinite: "skip" leaves a parameter whose gradient is not finite as it is; "raise" stops before any moves.
    """

    clip_scope: ClipScope
    peak_lr: float | None
    warmup_steps: int
    total_steps: int | None
    clip_form: Literal["soft", "hard"]
    clip_decay: ClipDecay
    clip_decay_fraction: float
    clip_final: float
    on_nonfinite: Literal["skip", "raise"]


class SpectralOptions(ClippingOptions, total=False):
    """Options that every recipe takes by keyword: the clip's, and these.

    Attributes:
        shrink_at: "gradient", or "direction" to shrink what the base direction gives instead.
        shrink_form: "redescending", "monotone" or "hard"; see :func:`spectrim.smooth_shrink`.
        state_dtype: in which the direction's state is kept: "float32", or "bfloat16" with stochastic rounding; None for
            float32, or the parameter's dtype where that is wider.
        maximize: ascend instead of descend.
        exchange_dtype: in which sharded matrices travel to the rank that works on them and back: "float32", the
            default, or "bfloat16" for half the bytes.
    """

    shrink_at: Literal["gradient", "direction"]
    shrink_form: ShrinkForm
    state_dtype: Literal["float32", "bfloat16"] | None
    maximize: bool
    exchange_dtype: Literal["float32", "bfloat16"]


_DEFAULTS: dict[str, Any] = {
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "clip": None,
    "pre_clip": None,
    "shrink": None,
    "scale": "none",
    "clip_scope": "matrices",
    "peak_lr": None,
    "warmup_steps": 0,
    "total_steps": None,
    "clip_form": "soft",
    "clip_decay": "constant",
    "clip_decay_fraction": 0.1,
    "clip_final": 0.1,
    "shrink_at": "gradient",
    "shrink_form": DEFAULT_SHRINK_FORM,
    "state_dtype": None,
    "maximize": False,
    "exchange_dtype": "float32",
    "on_nonfinite": "skip",
}

# What a group holds besides options: what torch keeps there, what grouping says, and what schedulers leave behind.
_STRUCTURE = {"params", "param_names", "role", "layout", "split", "lr_scale", "steps_taken"}
_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}

_CHOICES: dict[str, tuple[str, ...]] = {
    "role": ROLES,
    "layout": LAYOUTS,
    "scale": SCALES,
    "clip_scope": ("all", "matrices"),
    "clip_form": ("soft", "hard"),
    "clip_decay": CLIP_DECAYS,
    "shrink_at": ("gradient", "direction"),
    "shrink_form": get_args(ShrinkForm),
    "state_dtype": ("float32", "bfloat16"),
    "on_nonfinite": ("skip", "raise"),
    "exchange_dtype": ("float32", "bfloat16"),
}
_POSITIVE_OR_AUTO = ("clip", "shrink")
_AT_LEAST_ZERO = ("weight_decay", "eps", "warmup_steps", "lr_scale")


def complete_options(options: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of an optimizer: every recipe's, then its own, then what its caller gave by keyword.

    Raises:
        TypeError: a keyword that is no option.
    """
    allowed = SpectralOptions.__annotations__
    for key in extra:
        if key not in allowed:
            raise TypeError(f"unexpected option {key!r}: expected one of {', '.join(sorted(allowed))}")
    return {**_DEFAULTS, **options, **extra}


def finish_group(group: dict[str, Any], defaults: Mapping[str, Any], index: int) -> None:
    """Complete a group in place: learning rate times its factor, peak learning rate, step count, all of it checked.

    Raises:
        ValueError: an unknown key or a value that is not allowed, naming the group, its first parameters and the
            choices.
    """
    where = f"group {index}{_first_names(group)}"
    for key in group:
        if key not in defaults and key not in _STRUCTURE and key not in _SCHEDULERS:
            raise ValueError(f"unknown option {key!r} for {where}: expected one of {', '.join(sorted(defaults))}")
    group.setdefault("lr_scale", 1.0)
    group.setdefault("split", None)
    if "lr" not in group:
        # Only a default is scaled: a group that states its learning rate, as one taken from another optimizer does,
        # has it.
        group["lr"] = defaults["lr"] * group["lr_scale"]
    group.setdefault("steps_taken", 0)
    for key, value in defaults.items():
        group.setdefault(key, value)
    _check(group, where)
    if group["peak_lr"] is None:
        lr = group["lr"]
        group["peak_lr"] = float(lr)


def effective_options(group: Mapping[str, Any], role: str, *, follows: bool) -> dict[str, Any]:
    """A group's options as they act on a parameter of this role.

    A parameter that does not follow the recipe gets plain AdamW. Gradients of embeddings and heads are not
    shrunk: their rows belong to tokens, which differ in frequency by orders of magnitude, and a scale taken over all of
    them would call the frequent ones outliers.
    """
    if not follows:
        # AdEMAMix has a third beta, which is no business of AdamW's.
        off = {"clip": None, "pre_clip": None, "shrink": None, "scale": "none"}
        return {**group, **off, "betas": tuple(group["betas"][:2])}
    if role in ("embedding", "head"):
        return {**group, "shrink": None}
    return dict(group)


def is_zero(lr: float | Tensor) -> bool:
    """Whether a learning rate is known to be zero without reading a device."""
    return isinstance(lr, float | int) and lr == 0


def _check(group: Mapping[str, Any], where: str) -> None:
    for key, choices in _CHOICES.items():
        value = group.get(key)
        if value is not None and value not in choices:
            raise ValueError(f"{key}={value!r} for {where}: expected one of {', '.join(map(repr, choices))}")
    for key in _POSITIVE_OR_AUTO:
        value = group[key]
        if value is not None and value != "auto" and not _is_number(value, above=0):
            raise ValueError(f'{key}={value!r} for {where}: expected a positive number, "auto" or None')
    if group["pre_clip"] is not None and not _is_number(group["pre_clip"], above=0):
        raise ValueError(f"pre_clip={group['pre_clip']!r} for {where}: expected a positive number or None")
    for key in ("orthogonalize_steps", "slow_warmup_steps"):
        value = group.get(key)
        if value is not None and not (isinstance(value, int) and value > 0):
            raise ValueError(f"{key}={value!r} for {where}: expected a positive whole number or None")
    for key in _AT_LEAST_ZERO:
        if not _is_number(group[key], above=0, inclusive=True):
            raise ValueError(f"{key}={group[key]!r} for {where}: expected a number of at least 0")
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr of shape {tuple(lr.shape)} for {where}: expected one number")
    elif not _is_number(lr, above=0, inclusive=True):
        raise ValueError(f"lr={lr!r} for {where}: expected a number of at least 0")
    decays = [("betas", beta) for beta in group["betas"]] + [
        ("momentum", group[key]) for key in ("momentum",) if key in group
    ]
    for key, value in decays:
        if not (_is_number(value, above=0, inclusive=True) and value < 1):
            raise ValueError(f"{key}={group[key]!r} for {where}: expected numbers from 0 up to, but not including, 1")
    if "rank_ratio" in group and not (_is_number(group["rank_ratio"], above=0) and group["rank_ratio"] <= 1):
        raise ValueError(f"rank_ratio={group['rank_ratio']!r} for {where}: expected a number above 0 and at most 1")
    for key in ("clip_decay_fraction", "clip_final"):
        if not (_is_number(group[key], above=0) and group[key] <= 1):
            raise ValueError(f"{key}={group[key]!r} for {where}: expected a number above 0 and at most 1")
    if group["clip_decay"] != "constant" and not _is_number(group["total_steps"], above=0):
        raise ValueError(
            f"total_steps={group['total_steps']!r} for {where}: "
            f"clip_decay={group['clip_decay']!r} needs the length of training"
        )


def _is_number(value: object, *, above: float, inclusive: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, float | int) or not math.isfinite(value):
        return False
    return value >= above if inclusive else value > above


def _first_names(group: Mapping[str, Any]) -> str:
    params = cast("list[Any]", group.get("params") if isinstance(group.get("params"), list) else [])
    names = [item[0] for item in params[:2] if isinstance(item, tuple)] or list(group.get("param_names", ()))[:2]
    return f" ({', '.join(map(repr, names))}{', ...' if len(params) > len(names) else ''})" if names else ""
