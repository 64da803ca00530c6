"""The options of a param group: their defaults and their checks. :mod:`spectrim.optim.rules` reads them for a step."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypedDict, cast, get_args

from torch import Tensor

from spectrim.operators import DEFAULT_SHRINK_FORM, ShrinkForm
from spectrim.operators.clip import Precision
from spectrim.optim.grouping.layout import LAYOUTS
from spectrim.optim.grouping.plain import as_option, unwrapped
from spectrim.optim.grouping.roles import ROLES

__all__ = [
    "ClipDecay",
    "ClipScope",
    "ClippingOptions",
    "Scale",
    "SpectralOptions",
    "complete_options",
    "finish_group",
    "is_zero",
]

ClipDecay = Literal["constant", "linear", "cosine", "sqrt", "square", "exponential"]
ClipScope = Literal["all", "matrices"]
Scale = Literal["none", "original", "match_rms_adamw", "rms"]


class ClippingOptions(TypedDict, total=False):
    """Options of spectral clipping. Each can also be set in a param group.

    Attributes:
        clip_scope: "all" clips every role. "matrices" does not clip embeddings, heads and vectors; this library's
            recipes step them by plain AdamW then.
        peak_lr: the peak learning rate, to which thresholds refer. None uses ``max_lr`` or ``initial_lr``, which
            torch's schedulers set, else the group's first learning rate; or the largest rate of any step so far, if
            that is larger.
        warmup_steps: number of steps in which threshold times learning rate is constant. "auto" takes all steps until
            the learning rate has first reached the peak that a scheduler, or else ``peak_lr``, states; without either
            there is no warm-up, and none for a learning rate in a tensor on an accelerator, which is not read.
        total_steps: length of training; needed unless ``clip_decay`` and ``pre_clip_decay`` are "constant".
        clip_form: "soft" shrinks every singular value σ to σ/√(1+σ²/c²); "hard" lowers those above c to c.
        clip_decay: the curve by which the threshold falls over the last ``clip_decay_fraction`` of training.
        clip_decay_fraction: share of training over which the threshold falls.
        clip_final: factor on the threshold at the end of training; 0 for a threshold that decays to zero (to a
            millionth, and "exponential" needs more than 0).
        on_nonfinite: reaction to a gradient that is not finite: "skip" leaves all parameters and state unchanged in
            this step; "raise" raises an error before any change, which reads the device.
        precision: of the operators: "half" computes in float16 with float32 accumulation, "exact" to 1e-3; "auto" is
            "half" on devices with fast float16 products (CUDA), else "exact".
    """

    clip_scope: ClipScope
    peak_lr: float | None
    warmup_steps: int | Literal["auto"]
    total_steps: int | None
    clip_form: Literal["soft", "hard"]
    clip_decay: ClipDecay
    clip_decay_fraction: float
    clip_final: float
    on_nonfinite: Literal["skip", "raise"]
    precision: Precision


class SpectralOptions(ClippingOptions, total=False):
    """Keyword options of every recipe, in addition to those of :class:`ClippingOptions`.

    Attributes:
        pre_clip_decay: the curve over the whole of training by which ``pre_clip`` changes to ``pre_clip_final`` times
            itself, which may be more. "constant" for the given threshold, which during warm-up is larger so that it
            times the learning rate is constant.
        pre_clip_final: factor on ``pre_clip`` at the end of training, above 0.
        shrink_at: shrink entries of the "gradient" or of the base "direction".
        shrink_form: "redescending", "monotone" or "hard"; see :func:`spectrim.smooth_shrink`.
        state_dtype: dtype of the direction's state: "float32", or "bfloat16" with stochastic rounding; None for
            float32, or float64 if the parameter is float64.
        maximize: ascend instead of descend.
        exchange_dtype: dtype in which sharded matrices are sent to owner ranks and back: "float32", the default, or
            "bfloat16" for half the bytes.
    """

    pre_clip_decay: ClipDecay
    pre_clip_final: float
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
    "warmup_steps": "auto",
    "total_steps": None,
    "clip_form": "soft",
    "clip_decay": "constant",
    "clip_decay_fraction": 0.1,
    "clip_final": 0.1,
    "pre_clip_decay": "constant",
    "pre_clip_final": 0.1,
    "shrink_at": "gradient",
    "shrink_form": DEFAULT_SHRINK_FORM,
    "state_dtype": None,
    "maximize": False,
    "exchange_dtype": "float32",
    "on_nonfinite": "skip",
    "precision": "auto",
}


def complete_options(
    options: Mapping[str, Any], extra: Mapping[str, Any], allowed: Iterable[str] = SpectralOptions.__annotations__
) -> dict[str, Any]:
    """The defaults of an optimizer: the library's, overridden by the recipe's, overridden by the caller's.

    Raises:
        TypeError: a caller's keyword is not allowed.
    """
    for key in extra:
        if key not in allowed:
            raise TypeError(f"unexpected option {key!r}: expected one of {', '.join(sorted(allowed))}")
    return {key: as_option(value) for key, value in {**_DEFAULTS, **options, **extra}.items()}


def finish_group(group: dict[str, Any], defaults: Mapping[str, Any], index: int) -> None:
    """Complete a group's options in place and check them.

    Unknown keys are kept, as torch keeps them: frameworks store their own values in groups.

    Raises:
        ValueError: a value is not allowed; the message names the group, its first parameters and the choices.
    """
    where = f"group {index}{_first_names(group)}"
    for key in group:
        _warn_of_near_miss(key, defaults, where)
        if key != "params":
            group[key] = unwrapped(group[key])
    group.setdefault("lr_factor", 1.0)
    group.setdefault("split", None)
    if "lr" not in group:
        # Only the default is scaled. A learning rate that the group states, as groups of another optimizer do, already
        # includes the factor.
        lr = defaults["lr"]
        group["lr"] = (
            lr * group["lr_factor"] if isinstance(lr, float | int | Tensor) and group["lr_factor"] != 1.0 else lr
        )
    group.setdefault("steps_taken", 0)
    # The optimizer's default decay does not apply to vectors, but a decay that their group states does.
    group.setdefault("decays_vectors", "weight_decay" in group)
    for key, value in defaults.items():
        group.setdefault(key, value)
    for key in (*defaults, "lr_factor", "split"):
        group[key] = as_option(group[key])
    _check(group, where)
    group.setdefault("first_lr", float(group["lr"]))
    group.setdefault("largest_lr", 0.0)


def is_zero(lr: float | Tensor) -> bool:
    """True if a learning rate is known to be zero without reading a device."""
    return isinstance(lr, float | int) and lr == 0


def _warn_of_near_miss(key: str, defaults: Mapping[str, Any], where: str) -> None:
    if key not in defaults and key not in _KNOWN and (close := difflib.get_close_matches(key, defaults, 1, 0.8)):
        warnings.warn(f"unknown option {key!r} for {where} has no effect: did you mean {close[0]!r}?", stacklevel=4)


#: Keys of groups that are not options: those of torch, its schedulers and :func:`param_groups`.
_KNOWN = {
    *("params", "param_names", "role", "layout", "split", "lr_factor", "steps_taken", "first_lr", "recipe"),
    *("largest_lr", "decays_vectors", "matrices", "lr_scale"),
    *("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "name"),
}


#: The test that an option's value must pass, and the expected values in words.
_Check = tuple[Callable[[Any], bool], str]


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _decay(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _one_of(*choices: str, none: bool = False) -> _Check:
    return lambda v: v in choices or (none and v is None), f"one of {', '.join(map(repr, choices))}"


_FACTOR: _Check = (lambda v: v is None or v == "auto" or _positive(v), 'a positive number, "auto" or None')
_SHARE: _Check = (lambda v: _positive(v) and v <= 1, "a number above 0 and at most 1")
_COUNT: _Check = (lambda v: v is None or (_is_whole(v) and v > 0), "a positive whole number or None")
_AT_LEAST_0: _Check = (lambda v: _is_number(v) and v >= 0, "a number of at least 0")
_FLAG: _Check = (lambda v: isinstance(v, bool), "True or False")

_CHECKS: dict[str, _Check] = {
    "role": _one_of(*ROLES, none=True),
    "layout": _one_of(*LAYOUTS, none=True),
    "scale": _one_of(*get_args(Scale)),
    "clip_scope": _one_of(*get_args(ClipScope)),
    "clip_form": _one_of("soft", "hard"),
    **dict.fromkeys(("clip_decay", "pre_clip_decay"), _one_of(*get_args(ClipDecay))),
    "shrink_at": _one_of("gradient", "direction"),
    "shrink_form": _one_of(*get_args(ShrinkForm)),
    "state_dtype": _one_of("float32", "bfloat16", none=True),
    "on_nonfinite": _one_of("skip", "raise"),
    "precision": _one_of(*get_args(Precision)),
    "exchange_dtype": _one_of("float32", "bfloat16"),
    **dict.fromkeys(("clip", "shrink"), _FACTOR),
    "pre_clip": (lambda v: v is None or _positive(v), "a positive number or None"),
    "peak_lr": (lambda v: v is None or (_is_number(v) and v >= 0), "a number of at least 0, or None"),
    "momentum": (_decay, "a number from 0 up to, but not including, 1"),
    "alpha": (_is_number, "a finite number"),
    "gamma": (lambda v: _is_number(v) and v >= 0, "a number of at least 0"),
    "adamw_betas": (
        lambda v: isinstance(v, tuple) and len(v) == 2 and all(map(_decay, v)),
        "2 numbers from 0 up to, but not including, 1",
    ),
    "power_steps": (lambda v: _is_whole(v) and v > 0, "a positive whole number"),
    **dict.fromkeys(("rank_ratio", "clip_decay_fraction"), _SHARE),
    "clip_final": (lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "pre_clip_final": (_positive, "a positive number"),
    **dict.fromkeys(("total_steps", "orthogonalize_steps", "slow_warmup_steps"), _COUNT),
    "warmup_steps": (lambda v: v == "auto" or (_is_whole(v) and v >= 0), 'a whole number of at least 0, or "auto"'),
    **dict.fromkeys(("weight_decay", "eps", "lr_factor"), _AT_LEAST_0),
    **dict.fromkeys(("nesterov", "maximize"), _FLAG),
    "lr": (lambda v: isinstance(v, Tensor) or (_is_number(v) and v >= 0), "a number of at least 0"),
    "betas": (
        lambda v: isinstance(v, tuple) and all(map(_decay, v)),
        "numbers from 0 up to, but not including, 1",
    ),
}


def _check(group: Mapping[str, Any], where: str) -> None:
    def refuse(key: str, expected: str) -> None:
        # YAML, forms and environment variables give 2e-3 as a string.
        text = "; this is text, not a number" if _spells_number(group[key]) else ""
        raise ValueError(f"{key}={group[key]!r} for {where}: expected {expected}{text}")

    for key, (passes, expected) in _CHECKS.items():
        if key in group and not passes(group[key]):
            refuse(key, expected)
    lr, count = group["lr"], 3 if "alpha" in group else 2
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr of shape {tuple(lr.shape)} for {where}: expected one number")
    if len(group["betas"]) != count:
        refuse("betas", f"{count} numbers")
    for key in ("clip_decay", "pre_clip_decay"):
        if group[key] != "constant" and group["total_steps"] is None:
            refuse("total_steps", f"the number of training steps, which {key}={group[key]!r} needs")
    if group["clip_decay"] == "exponential" and group["clip_final"] == 0:
        refuse("clip_final", "a number above 0 with clip_decay='exponential'")


def _spells_number(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def _first_names(group: Mapping[str, Any]) -> str:
    params = cast("list[Any]", group.get("params") if isinstance(group.get("params"), list) else [])
    names = [item[0] for item in params[:2] if isinstance(item, tuple)] or list(group.get("param_names", ()))[:2]
    return f" ({', '.join(map(repr, names))}{', ...' if len(params) > len(names) else ''})" if names else ""
