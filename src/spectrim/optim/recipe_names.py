"""Names of recipes, base[+shrink][+preclip][+clip], as the command line takes them, and their optimizers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from spectrim.optim import recipes as classes
from spectrim.optim.grouping.groups import param_groups
from spectrim.optim.grouping.layout import Split
from spectrim.optim.grouping.roles import Role
from spectrim.optim.optimizer import SpectralOptimizer

__all__ = ["BASES", "MODIFIERS", "PRE_CLIP", "Base", "create", "parse_name", "recipes"]

#: The published threshold of ``+preclip`` on the gradient's singular values (arXiv 2603.14315).
PRE_CLIP = 0.1

#: Modifiers in the order of a name, each with the option and the value that it sets.
MODIFIERS: Mapping[str, tuple[str, Any]] = {
    "shrink": ("shrink", "auto"),
    "preclip": ("pre_clip", PRE_CLIP),
    "clip": ("clip", "auto"),
}


@dataclass(frozen=True)
class Base:
    """The first part of a name: its optimizer, and the modifiers that it allows."""

    optimizer: type[SpectralOptimizer]
    modifiers: tuple[str, ...]


BASES: Mapping[str, Base] = {
    "adamw": Base(classes.AdamW, tuple(MODIFIERS)),
    "signum": Base(classes.Signum, tuple(MODIFIERS)),
    "ademamix": Base(classes.AdEMAMix, tuple(MODIFIERS)),
    "mars": Base(classes.MARS, tuple(MODIFIERS)),
    "momentum": Base(classes.Momentum, tuple(MODIFIERS)),
    "spectra": Base(classes.Spectra, ("shrink", "clip")),
    "muon": Base(classes.Muon, ("shrink",)),
}


def parse_name(name: str) -> tuple[str, tuple[str, ...]]:
    """Split a name into its base and its modifiers, the latter in the order of :data:`MODIFIERS`.

    Raises:
        ValueError: the base is unknown, it does not take a modifier, or a modifier is repeated.
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
    no_decay: Sequence[Role] = (),
    split: Mapping[str, Split] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> SpectralOptimizer:
    """Make an optimizer by name, for a model, whose parameters are grouped by role, or for param groups.

        optimizer = spectrim.create("adamw+clip", model, lr=2e-3, weight_decay=0.1)

    Args:
        name: one of :func:`recipes`; modifiers may come in any order.
        model_or_params: a module, or parameters or groups as for every torch optimizer.
        lr: learning rate; also the peak for ``clip="auto"``, unless ``peak_lr`` is given.
        embedding_lr, head_lr, no_decay, split, overrides: passed to :func:`.param_groups`; for a module only.
        options: options of the optimizer. ``clip``, ``shrink`` and ``pre_clip`` replace the value that a modifier sets.

    Raises:
        ValueError: the name is unknown, an option contradicts the name's modifiers, or an argument for modules was
            given with parameters.
        TypeError: an option is unknown.
    """
    base, modifiers = parse_name(name)
    for modifier, (option, value) in MODIFIERS.items():
        if modifier in modifiers:
            if options.setdefault(option, value) is None:
                raise ValueError(f"{option}=None: recipe {name!r} has +{modifier}")
        elif options.get(option) is not None:
            raise ValueError(f"{option}={options[option]!r}: recipe {name!r} has no +{modifier}")
    grouping: dict[str, Any] = {
        "embedding_lr": embedding_lr,
        "head_lr": head_lr,
        "no_decay": no_decay,
        "split": split,
        "overrides": overrides,
    }
    params = model_or_params
    if isinstance(params, nn.Module):
        params = param_groups(params, **grouping)
    elif given := [key for key, value in grouping.items() if value not in (1, (), None, {})]:
        raise ValueError(f"{given[0]} is for a module; give param_groups(model, {given[0]}=...) in place of parameters")
    optimizer: Any = BASES[base].optimizer
    made: SpectralOptimizer = optimizer(params, lr=lr, **options)
    return made
