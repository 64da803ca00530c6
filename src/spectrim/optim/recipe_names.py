"""Recipes by name: base[+shrink][+preclip][+clip], as on the command line, and the optimizer that a name stands for."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from spectrim.optim import recipes as classes
from spectrim.optim.grouping.groups import param_groups
from spectrim.optim.grouping.layout import Split
from spectrim.optim.optimizer import SpectralOptimizer

__all__ = ["BASES", "MODIFIERS", "PRE_CLIP", "Base", "create", "parse_name", "recipes"]

#: The threshold of ``+preclip`` on the gradient's singular values: the published setting (arXiv 2603.14315).
PRE_CLIP = 0.1

#: Modifiers in the order of a name: the option that each sets, and what it sets it to.
MODIFIERS: Mapping[str, tuple[str, Any]] = {
    "shrink": ("shrink", "auto"),
    "preclip": ("pre_clip", PRE_CLIP),
    "clip": ("clip", "auto"),
}


@dataclass(frozen=True)
class Base:
    """A base of names: its optimizer, and the modifiers that it takes."""

    optimizer: type[SpectralOptimizer]
    modifiers: tuple[str, ...]


BASES: Mapping[str, Base] = {
    "adamw": Base(classes.AdamW, tuple(MODIFIERS)),
    "signum": Base(classes.Signum, tuple(MODIFIERS)),
    "ademamix": Base(classes.AdEMAMix, tuple(MODIFIERS)),
    "momentum": Base(classes.Momentum, tuple(MODIFIERS)),
    "spectra": Base(classes.Spectra, ("shrink", "clip")),
    "muon": Base(classes.Muon, ("shrink",)),
}


def parse_name(name: str) -> tuple[str, tuple[str, ...]]:
    """A name's base, and its modifiers in their own order.

    Raises:
        ValueError: base or modifier is unknown, the base does not take the modifier, or a modifier stands twice.
    """
    base, *modifiers = str(name).split("+")
    if base not in BASES:
        raise ValueError(
            f"unknown recipe {name!r}: expected base[+shrink][+preclip][+clip] with base one of {', '.join(BASES)}"
        )
    allowed = BASES[base].modifiers
    for modifier in modifiers:
        if modifier not in allowed:
            raise ValueError(f"unknown recipe {name!r}: {base} takes {', '.join('+' + known for known in allowed)}")
    if len(set(modifiers)) < len(modifiers):
        raise ValueError(f"unknown recipe {name!r}: a modifier stands twice")
    return base, tuple(modifier for modifier in MODIFIERS if modifier in modifiers)


def recipes() -> tuple[str, ...]:
    """The names that :func:`create` takes, plain ones first."""
    return tuple(
        "+".join((base, *chosen))
        for base, known in BASES.items()
        for count in range(len(known.modifiers) + 1)
        for chosen in itertools.combinations(known.modifiers, count)
    )


def create(
    name: str,
    model_or_params: nn.Module | ParamsT,
    *,
    lr: float | Tensor,
    embedding_lr: float = 1.0,
    head_lr: float = 1.0,
    split: Mapping[str, Split] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> SpectralOptimizer:
    """The optimizer that a name stands for, over a model, whose parameters are told apart, or over param groups.

        optimizer = spectrim.create("adamw+clip", model, lr=2e-3, weight_decay=0.1)

    Args:
        name: one of :func:`recipes`; modifiers may come in any order.
        model_or_params: a module, or what every torch optimizer takes.
        lr: learning rate; also the peak that ``clip="auto"`` refers to, unless ``peak_lr`` is given.
        embedding_lr, head_lr, split, overrides: of :func:`.param_groups`, for a module.
        options: of the optimizer. Those that modifiers stand for may say how: ``clip``, ``shrink``, ``pre_clip``.

    Raises:
        ValueError: an unknown name; an option whose modifier the name does not have, or that switches one off; or what
            is for modules only, given with parameters.
        TypeError: an unknown option.
    """
    base, modifiers = parse_name(name)
    for modifier, (option, value) in MODIFIERS.items():
        if modifier in modifiers:
            if options.setdefault(option, value) is None:
                raise ValueError(f"{option}=None: recipe {name!r} has +{modifier}")
        elif options.get(option) is not None:
            raise ValueError(f"{option}={options[option]!r}: recipe {name!r} has no +{modifier}")
    if isinstance(model_or_params, nn.Module):
        params: ParamsT = param_groups(
            model_or_params, embedding_lr=embedding_lr, head_lr=head_lr, split=split, overrides=overrides
        )
    else:
        for key, given in (
            ("embedding_lr", embedding_lr != 1),
            ("head_lr", head_lr != 1),
            ("split", split),
            ("overrides", overrides),
        ):
            if given:
                raise ValueError(f"{key} is for a module; give param_groups(model, {key}=...) in place of parameters")
        params = model_or_params
    optimizer: Any = BASES[base].optimizer
    made: SpectralOptimizer = optimizer(params, lr=lr, **options)
    return made
