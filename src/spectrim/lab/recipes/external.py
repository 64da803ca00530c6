"""External optimizers, by import path ``module:Class``: loaded, checked, and built over the lab's groups.

The class keeps its own defaults except for the learning rate, which the lab schedules, and the weight decay, which all
recipes share. Modules are imported from installed packages, then from the current directory. An import runs code, so
only recipes that the user has named (:func:`trust`) are imported, never those that only a file names.
"""

import importlib
import importlib.util
import inspect
import io
import math
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from spectrim.lab.config import OptimizerConfig
from spectrim.lab.errors import LabError, LabWarning

__all__ = ["ANY", "build", "check_path", "default_lr", "is_external", "load_class", "trust", "trusted"]

ANY = "*"
"""Stands for every import path."""

_trusted: ContextVar[frozenset[str]] = ContextVar("trusted", default=frozenset())

DECOUPLING = ("decoupled_weight_decay", "weight_decouple")
"""Names of the argument that decouples weight decay from the gradient; the lab sets it to True."""

LAB_KEYS = ("lr", "weight_decay")
"""Arguments that the lab gives itself, from its own settings."""


def is_external(base: str) -> bool:
    """True if a recipe's base is an import path."""
    return ":" in base


def trust(recipes: Iterable[str]) -> None:
    """Allow the import of these recipes' modules in this thread; :data:`ANY` means all."""
    _trusted.set(_trusted.get() | {recipe.partition("+")[0] for recipe in recipes})


def trusted() -> frozenset[str]:
    """All recipes allowed by :func:`trust`, to pass on to another process."""
    return _trusted.get()


def is_trusted(path: str) -> bool:
    """True if the path may be imported; torch's own optimizers always may."""
    return path.startswith("torch.optim:") or not {path, ANY}.isdisjoint(_trusted.get())


def check_path(path: str) -> None:
    """Check that a string is an import path.

    Raises:
        LabError: it is not.
    """
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", path):
        raise LabError(f"optimizer {path!r}: expected module:Class, such as torch.optim:NAdam")


def load_class(path: str) -> type[Optimizer]:
    """The optimizer class at ``module:Class``.

    Raises:
        LabError: the path is invalid, only a file names it, it cannot be imported, or the lab cannot train with the
        class.
    """
    check_path(path)
    if not is_trusted(path):
        raise LabError(
            f"recipe {path!r} runs code of the module {path.partition(':')[0]!r}, and was named in a file alone: name "
            f"it on the command line too, or give --trust-recipes if the files are to be trusted"
        )
    return import_class(path)


@cache
def import_class(path: str) -> type[Optimizer]:
    module_name, _, class_name = path.partition(":")
    top = module_name.partition(".")[0]
    if importlib.util.find_spec(top) is None and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
        importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise LabError(f"optimizer {path!r}: cannot import {module_name!r}: {error}") from None
    found = getattr(module, class_name, None)
    if found is None:
        raise LabError(f"optimizer {path!r}: module {module_name!r} has no {class_name!r}")
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise LabError(f"optimizer {path!r}: expected a class derived from torch.optim.Optimizer, found {found!r}")
    check_class(path, found)
    return found


def check_class(path: str, found: type[Optimizer]) -> None:
    """Check that the lab's loop can use a class."""
    closure = inspect.signature(found.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise LabError(f"optimizer {path!r}: its step needs a closure, which the lab does not support")
    if "lr" not in parameters(found):
        raise LabError(f"optimizer {path!r}: it takes no learning rate 'lr', which the lab's schedule drives")
    if callable(getattr(found, "train", None)) and callable(getattr(found, "eval", None)):
        raise LabError(
            f"optimizer {path!r}: it must be switched between train() and eval(), since it evaluates other weights "
            f"than it trains (schedule-free methods do); the lab does not support that"
        )


def parameters(found: type[Optimizer]) -> dict[str, inspect.Parameter]:
    """The constructor's named parameters; with ``**options``, also those of its base class."""
    named: dict[str, inspect.Parameter] = {}
    for owner in found.__mro__:
        if owner is Optimizer:
            break
        if "__init__" not in vars(owner):
            continue
        own = inspect.signature(vars(owner)["__init__"]).parameters
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        for name, parameter in own.items():
            if parameter.kind not in variable and name not in ("self", "params", "defaults"):
                named.setdefault(name, parameter)
        if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in own.values()):
            break
    return named


def default_lr(path: str) -> float:
    """The default learning rate of the class.

    Raises:
        LabError: it has none.
    """
    default = parameters(load_class(path))["lr"].default
    if isinstance(default, int | float) and math.isfinite(default) and default > 0:
        return float(default)
    raise LabError(f"optimizer {path!r} has no learning rate of its own, give one with --lr")


def build(
    path: str, model: nn.Module, settings: OptimizerConfig, *, clip: Mapping[str, Any] | None = None
) -> Optimizer:
    """The optimizer over a model's parameters.

    Args:
        path: ``module:Class``.
        model: read by :func:`spectrim.param_groups`; each group states its own learning rate and vectors do not decay.
        settings: ``lr``, its factors for embeddings and head, ``weight_decay`` and ``arguments`` are used.
        clip: options of :class:`spectrim.SpectralClipping` around it; None leaves it as it is.

    Raises:
        LabError: an argument that the class does not take, or the class's own refusal.
    """
    import spectrim

    given = keywords(path, settings)
    groups = spectrim.param_groups(model, embedding_lr=settings.embedding_lr or 1.0, head_lr=settings.head_lr or 1.0)
    decayed = ("matrix", "embedding", "head") if settings.decay_embeddings else ("matrix",)
    assert settings.lr is not None
    plain = [
        {
            "params": [parameter for _, parameter in group["params"]],
            "param_names": [name for name, _ in group["params"]],
            **{key: group[key] for key in ("role", "layout", "split")},
            "lr": settings.lr * group["lr_factor"],
            **({"weight_decay": 0.0} if group["role"] not in decayed and "weight_decay" in given else {}),
        }
        for group in groups
    ]
    rehearse(path, given, plain)
    optimizer = construct(path, plain, given)
    if clip is None:
        return optimizer
    try:
        return spectrim.SpectralClipping(optimizer, **clip)
    except (TypeError, ValueError) as error:
        raise LabError(f"recipe '{path}+clip': {error}") from None


def keywords(path: str, settings: OptimizerConfig) -> dict[str, Any]:
    """The keyword arguments for the constructor."""
    names = parameters(load_class(path))
    for key in settings.arguments:
        if key not in names:
            raise LabError(f"optimizer {path!r} takes no argument {key!r}, expected one of {', '.join(names)}")
        if key in LAB_KEYS:
            raise LabError(f"optimizer.arguments.{key}: set optimizer.{key} instead")
    ours: dict[str, Any] = {"lr": settings.lr}
    if "weight_decay" in names:
        ours["weight_decay"] = settings.weight_decay
        ours |= {switch: True for switch in DECOUPLING if switch in names}
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.arguments.items()}
    return ours | arguments


def construct(path: str, groups: list[dict[str, Any]], given: Mapping[str, Any]) -> Optimizer:
    try:
        return load_class(path)(groups, **given)
    except Exception as error:  # an external constructor may raise any error
        raise LabError(f"optimizer {path!r} cannot be built: {type(error).__name__}: {error}") from error


def rehearse(path: str, given: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
    """Take two steps on a small parameter for each group, so that a class that cannot step is refused before a run.

    Warns (:class:`LabWarning`) if the state holds more than tensors and plain values.
    """
    small = []
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        for group in groups:
            shapes = {(6, 4, 3, 2)[: parameter.ndim] for parameter in group["params"]}
            stand_ins = [torch.randn(shape).requires_grad_() for shape in sorted(shapes)]
            names = [str(tuple(stand_in.shape)) for stand_in in stand_ins]
            small.append({**group, "params": stand_ins, "param_names": names})
        optimizer = construct(path, small, given)
        try:
            for _ in range(2):
                for group in small:
                    for parameter in group["params"]:
                        parameter.grad = torch.randn_like(parameter)
                optimizer.step()
        except Exception as error:  # as above
            raise LabError(f"optimizer {path!r} cannot step: {type(error).__name__}: {error}") from error
    state = io.BytesIO()
    try:
        torch.save(optimizer.state_dict(), state)
        state.seek(0)
        torch.load(state, weights_only=True)
    except Exception:  # as above
        message = f"the state of optimizer {path!r} cannot be read back from a checkpoint: a run cannot be resumed"
        warnings.warn(message, LabWarning, stacklevel=2)
