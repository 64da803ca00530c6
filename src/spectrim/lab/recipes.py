"""Recipes by name: base[+shrink][+preclip][+clip], what each builds, and the hyperparameters it starts from.

The defaults of every recipe stand in one table, ``defaults.toml``, which ``benchmarks/learning_rates.py`` writes from
the results of its grid; each entry says which result it comes from.
"""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import torch
from torch import nn

from spectrim.lab.config import Config, PositiveFloat, TrainConfig
from spectrim.lab.errors import LabError

__all__ = ["BASES", "Defaults", "Recipe", "build_optimizer", "default_hyperparameters", "parse_recipe", "resolve"]

MODIFIERS = ("shrink", "preclip", "clip")
"""In the order of a recipe's name."""

PRE_CLIP = 0.1
"""Threshold on the gradient's singular values; the published setting (arXiv 2603.14315)."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base of recipe names: a class of ``spectrim``, and which modifiers it knows."""

    optimizer: str
    modifiers: tuple[str, ...]
    more_betas: tuple[float, ...] = ()
    """What the class wants after (beta1, beta2)."""


BASES = {
    "adamw": Base(optimizer="AdamW", modifiers=MODIFIERS),
    "signum": Base(optimizer="Signum", modifiers=MODIFIERS),
    "ademamix": Base(optimizer="AdEMAMix", modifiers=MODIFIERS, more_betas=(0.9999,)),
    "momentum": Base(optimizer="Momentum", modifiers=MODIFIERS),
    "spectra": Base(optimizer="Spectra", modifiers=("shrink", "clip")),
    "muon": Base(optimizer="Muon", modifiers=("shrink",)),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A parsed recipe name."""

    base: str
    modifiers: frozenset[str]

    @property
    def name(self) -> str:
        """The name, its modifiers in canonical order."""
        return "+".join([self.base, *(modifier for modifier in MODIFIERS if modifier in self.modifiers)])


class Defaults(Config):
    """Hyperparameters of a recipe, and the result they come from."""

    lr: PositiveFloat
    embedding_lr: PositiveFloat = 1.0
    head_lr: PositiveFloat = 1.0
    clip_bound: PositiveFloat | None = None
    source: str


def parse_recipe(name: str) -> Recipe:
    """Read a recipe's name.

    Raises:
        LabError: base or modifier is unknown, the base does not have the modifier, or this version of spectrim does
            not have the base's optimizer.
    """
    base, *modifiers = name.split("+")
    if base not in BASES:
        raise LabError(
            f"unknown recipe {name!r}, expected base[+shrink][+preclip][+clip] with base one of {', '.join(BASES)}"
        )
    allowed = BASES[base].modifiers
    for modifier in modifiers:
        if modifier not in allowed:
            raise LabError(f"unknown recipe {name!r}: {base} takes {', '.join('+' + known for known in allowed)}")
    if len(set(modifiers)) < len(modifiers):
        raise LabError(f"unknown recipe {name!r}: a modifier stands twice")
    optimizer_class(base)
    return Recipe(base=base, modifiers=frozenset(modifiers))


def optimizer_class(base: str) -> Any:
    import spectrim

    found = getattr(spectrim, BASES[base].optimizer, None)
    if found is None:
        available = [name for name, known in BASES.items() if hasattr(spectrim, known.optimizer)]
        raise LabError(
            f"recipe base {base!r} is not in this version of spectrim, expected one of {', '.join(available)}"
        )
    return found


@cache
def defaults_table() -> dict[str, Defaults]:
    text = (resources.files("spectrim.lab") / "defaults.toml").read_text(encoding="utf-8")
    return {name: Defaults.parse(entry, source=f"defaults {name!r}") for name, entry in tomllib.loads(text).items()}


def default_hyperparameters(recipe: Recipe) -> Defaults:
    """The recipe's entry in the table; one that no grid has covered takes the nearest plainer recipe's.

    Plainer means without shrinking first, which moves the best learning rate least, then without pre-clipping.
    """
    table = defaults_table()
    modifiers = set(recipe.modifiers)
    for dropped in (None, *MODIFIERS):
        modifiers.discard(dropped or "")
        name = Recipe(base=recipe.base, modifiers=frozenset(modifiers)).name
        if name in table:
            entry = table[name]
            return entry if name == recipe.name else entry.model_copy(update={"source": f"as {name}: {entry.source}"})
    raise LabError(f"recipe {recipe.name!r} has no default learning rate yet, give one with --lr")


def resolve(config: TrainConfig) -> TrainConfig:
    """The configuration with the recipe's canonical name and every unset hyperparameter filled in.

    Raises:
        LabError: the recipe is unknown.
    """
    recipe = parse_recipe(config.recipe)
    optimizer = config.optimizer
    unset = [name for name in ("lr", "embedding_lr", "head_lr", "clip_bound") if getattr(optimizer, name) is None]
    if "clip" not in recipe.modifiers:
        if optimizer.clip_bound is not None:
            raise LabError(f"clip_bound={optimizer.clip_bound}: recipe {recipe.name!r} does not clip")
        unset.remove("clip_bound")
    if unset:
        defaults = default_hyperparameters(recipe)
        optimizer = optimizer.model_copy(update={name: getattr(defaults, name) for name in unset})
    return config.model_copy(update={"recipe": recipe.name, "optimizer": optimizer})


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The recipe's optimizer over the model's parameters; ``config`` has been resolved."""
    import spectrim

    recipe = parse_recipe(config.recipe)
    base = BASES[recipe.base]
    settings = config.optimizer
    arguments: dict[str, Any] = {
        "lr": settings.lr,
        "weight_decay": settings.weight_decay,
        "warmup_steps": config.warmup_steps,
        "total_steps": config.steps,
        "betas": (settings.beta1, settings.beta2, *base.more_betas),
    }
    if "shrink" in recipe.modifiers:
        arguments["shrink"] = "auto"
    if "preclip" in recipe.modifiers:
        arguments["pre_clip"] = PRE_CLIP
    if "clip" in recipe.modifiers:
        assert settings.lr is not None
        arguments["clip"] = "auto" if settings.clip_bound is None else settings.clip_bound / settings.lr
        # Spectra leaves embeddings and head to AdamW, clipped or not; the scope of the others is the paper's.
        if recipe.base != "spectra":
            arguments["clip_scope"] = "all"
    groups = spectrim.param_groups(model, embedding_lr=settings.embedding_lr or 1.0, head_lr=settings.head_lr or 1.0)
    optimizer: torch.optim.Optimizer = optimizer_class(recipe.base)(groups, **arguments)
    return optimizer
