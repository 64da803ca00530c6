"""Recipes by name, base[+shrink][+preclip][+clip]: their optimizers and hyperparameters.

A base is one of :data:`BASES`, or the import path of an external optimizer, which takes only +clip. Defaults are in
``defaults.toml``, which ``benchmarks/learning_rates.py`` writes from a grid search; each entry names its source.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import torch
from torch import nn

from spectrim.lab.config import OptimizerConfig, TrainConfig
from spectrim.lab.errors import LabError
from spectrim.lab.recipes import external
from spectrim.lab.settings import Config, PositiveFloat
from spectrim.optim.recipe_names import BASES, MODIFIERS, parse_name

__all__ = [
    "BASELINE",
    "BASES",
    "Defaults",
    "RecipeName",
    "build_optimizer",
    "canonical_names",
    "default_hyperparameters",
    "own_hyperparameters",
    "parse_recipe",
    "resolve",
    "shown",
]

BASELINE = "adamw"
"""The recipe that every other one is compared with."""

BETA3 = 0.9999
"""Default decay rate of AdEMAMix's slow average."""

MARS_BETAS = (0.95, 0.99)
"""Default decay rates of MARS, for matrices; its vectors have everyone's."""

MODIFIER_KEYS = {
    "shrink": ("shrink_factor", "shrink_form"),
    "preclip": ("pre_clip", "pre_clip_decay", "pre_clip_final"),
    "clip": ("clip_bound", "clip_form", "clip_scope", "clip_decay", "clip_decay_fraction", "clip_final"),
}
"""The hyperparameters that a modifier brings, by their names in the configuration."""


OWN = {
    "signum": ("momentum", "nesterov"),
    "ademamix": ("alpha", "beta3"),
    "mars": ("gamma", "mars_beta1", "mars_beta2"),
    "momentum": ("momentum", "nesterov"),
    "spectra": ("momentum", "rank_ratio", "power_steps"),
    "muon": ("momentum", "nesterov", "scale", "orthogonalize_steps"),
}
"""Hyperparameters that only some bases have, by their names in the configuration."""


@dataclass(frozen=True, kw_only=True)
class RecipeName:
    """A parsed recipe name."""

    base: str
    modifiers: frozenset[str]

    @property
    def name(self) -> str:
        """The name, its modifiers in canonical order."""
        return "+".join([self.base, *(modifier for modifier in MODIFIERS if modifier in self.modifiers)])

    @property
    def is_external(self) -> bool:
        """True if the base is an external optimizer."""
        return external.is_external(self.base)

    @property
    def folder(self) -> str:
        """The name as a folder's name on any system."""
        return self.name.replace(":", ".")


class Defaults(Config):
    """Hyperparameters of a recipe, and the result they come from."""

    lr: PositiveFloat
    embedding_lr: PositiveFloat = 1.0
    head_lr: PositiveFloat = 1.0
    clip_bound: PositiveFloat | None = None
    source: str


def canonical_names(names: Sequence[str]) -> tuple[str, ...]:
    """Recipes in their canonical spelling.

    Raises:
        LabError: one is unknown, or two of them are the same.
    """
    found = tuple(parse_recipe(name).name for name in names)
    if len(set(found)) < len(found):
        raise LabError(f"recipes {', '.join(names)}: two of them are the same")
    return found


def parse_recipe(name: str) -> RecipeName:
    """Read a recipe's name; the module of an external optimizer is not imported for it.

    Raises:
        LabError: base or modifier is unknown, or the base does not take the modifier.
    """
    base, *modifiers = name.split("+")
    if not external.is_external(base):
        try:
            base, found = parse_name(name)
        except ValueError as error:
            more = "" if base in BASES else ", or module:Class[+clip] for an external optimizer"
            raise LabError(f"{error}{more}") from None
        return RecipeName(base=base, modifiers=frozenset(found))
    external.check_path(base)
    if modifiers not in ([], ["clip"]):
        raise LabError(f"unknown recipe {name!r}: {base} takes +clip")
    return RecipeName(base=base, modifiers=frozenset(modifiers))


def own_hyperparameters(recipe: RecipeName) -> tuple[str, ...]:
    """The hyperparameters of this recipe that not every recipe has, by their names in the configuration."""
    of_base = ("arguments",) if recipe.is_external else OWN.get(recipe.base, ())
    return (
        *of_base,
        *(key for modifier in MODIFIERS if modifier in recipe.modifiers for key in MODIFIER_KEYS[modifier]),
    )


@cache
def defaults_table() -> dict[str, Defaults]:
    text = (resources.files("spectrim.lab.recipes") / "defaults.toml").read_text(encoding="utf-8")
    return {name: Defaults.parse(entry, source=f"defaults {name!r}") for name, entry in tomllib.loads(text).items()}


def default_hyperparameters(recipe: RecipeName) -> Defaults:
    """The recipe's entry in the table. Without one, the entry of the recipe without shrinking, which changes the best
    learning rate least, then also without pre-clipping.
    """
    if recipe.is_external:
        return Defaults(lr=external.default_lr(recipe.base), source=f"what {recipe.base} itself starts from")
    table = defaults_table()
    modifiers = set(recipe.modifiers)
    for dropped in (None, *MODIFIERS):
        modifiers.discard(dropped or "")
        name = RecipeName(base=recipe.base, modifiers=frozenset(modifiers)).name
        if name in table:
            entry = table[name]
            return entry if name == recipe.name else entry.model_copy(update={"source": f"as {name}: {entry.source}"})
    raise LabError(f"recipe {recipe.name!r} has no default learning rate yet, give one with --lr")


def resolve(config: TrainConfig) -> TrainConfig:
    """The configuration with the recipe's canonical name and every unset hyperparameter filled in.

    Raises:
        LabError: the recipe is unknown, or does not have a hyperparameter that is set.
    """
    recipe = parse_recipe(config.recipe)
    optimizer = config.optimizer
    refuse_foreign(recipe, optimizer)
    unset = [name for name in ("lr", "embedding_lr", "head_lr", "clip_bound") if getattr(optimizer, name) is None]
    if "clip" not in recipe.modifiers:
        unset.remove("clip_bound")
    if unset:
        defaults = default_hyperparameters(recipe)
        optimizer = optimizer.model_copy(update={name: getattr(defaults, name) for name in unset})
    if recipe.is_external:
        external.keywords(recipe.base, optimizer)
    return config.model_copy(update={"recipe": recipe.name, "optimizer": optimizer})


def refuse_foreign(recipe: RecipeName, settings: OptimizerConfig) -> None:
    """Refuse a setting that the recipe does not have, since it would be ignored."""
    own = own_hyperparameters(recipe)
    everyones: dict[str, Any] = OptimizerConfig().model_dump()
    unset: tuple[Any, ...] = (None, {})
    for key, value in settings.model_dump().items():
        if key in ("beta1", "beta2") and recipe.is_external and value != everyones[key]:
            raise LabError(f"{key}={value}: set the betas of {recipe.base!r} by optimizer.arguments.betas")
        if value in unset or everyones[key] not in unset or key in own or key in ("lr", "embedding_lr", "head_lr"):
            continue
        if key == "clip_bound":
            raise LabError(f"clip_bound={value}: recipe {recipe.name!r} does not clip")
        choices = f"its own are {', '.join(own)}" if own else "it has none of its own"
        raise LabError(f"{key}={value!r}: recipe {recipe.name!r} does not have that hyperparameter; {choices}")


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The recipe's optimizer over the model's parameters; ``config`` has been resolved."""
    import spectrim

    recipe = parse_recipe(config.recipe)
    settings = config.optimizer
    assert settings.lr is not None
    timing = {"warmup_steps": config.warmup_steps, "total_steps": config.steps}
    clip: dict[str, Any] = {}
    if "clip" in recipe.modifiers:
        clip["clip"] = "auto" if settings.clip_bound is None else settings.clip_bound / settings.lr
        clip |= {key: value for key in MODIFIER_KEYS["clip"][1:] if (value := getattr(settings, key)) is not None}
    if recipe.is_external:
        return external.build(recipe.base, model, settings, clip={**clip, **timing} if clip else None)

    own = OWN.get(recipe.base, ())
    betas: tuple[float, ...] = (settings.beta1, settings.beta2)
    if "beta3" in own:
        betas = (*betas, BETA3 if settings.beta3 is None else settings.beta3)
    arguments: dict[str, Any] = {"weight_decay": settings.weight_decay, "betas": betas, **timing, **clip}
    if recipe.base == "mars":
        chosen = zip((settings.mars_beta1, settings.mars_beta2), MARS_BETAS, strict=True)
        arguments |= {
            "betas": tuple(default if beta is None else beta for beta, default in chosen),
            "adamw_betas": betas,
        }
    plain = [key for key in own if "beta" not in key and getattr(settings, key) is not None]
    arguments |= {key: getattr(settings, key) for key in plain}
    given = {"shrink": settings.shrink_factor, "shrink_form": settings.shrink_form}
    given |= {key: getattr(settings, key) for key in MODIFIER_KEYS["preclip"]}
    arguments |= {key: value for key, value in given.items() if value is not None}
    factors: dict[str, Any] = {"embedding_lr": settings.embedding_lr or 1.0, "head_lr": settings.head_lr or 1.0}
    factors["no_decay"] = () if settings.decay_embeddings else ("embedding", "head")
    return spectrim.create(recipe.name, model, lr=settings.lr, **factors, **arguments)


def shown(value: Any) -> str:
    """A hyperparameter's value in a table or a line."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
