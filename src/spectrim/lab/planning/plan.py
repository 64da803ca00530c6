"""Plans a recipe without allocating or training a model: its effect on every parameter, as :func:`spectrim.describe`
shows it, or the cost of a step on many ranks (:mod:`spectrim.lab.planning.scaling`). The model is built on the meta
device, so that a model of any size is planned in seconds.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectrim.lab.errors import LabError
from spectrim.lab.models.published import PUBLISHED
from spectrim.lab.planning.scaling import Projection, active_parameters, project, read_work
from spectrim.lab.planning.settings import Cluster, Hardware

if TYPE_CHECKING:
    import torch
    from torch import nn

    from spectrim.optim.describe import Description

__all__ = ["SCALING_RECIPES", "plan", "plan_scaling"]

AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForImageTextToText",
    "AutoModelForImageClassification",
    "AutoModel",
)
"""Auto classes for configurations that name no architecture; the first that knows the configuration is taken."""

SCALING_RECIPES = ("adamw", "adamw+shrink", "adamw+clip", "signum+clip", "ademamix+clip", "spectra", "muon")
"""Recipes of a projection unless one is named."""


def plan(model: str, recipe: str, *, lr: float | None = None) -> "Description":
    """Describe what a recipe does to every parameter of a model, without allocating a weight.

    Args:
        model: a preset of the lab, a model type of transformers in its default size, or a configuration of
            transformers: a ``config.json`` or a folder that holds one; or a published shape of :data:`PUBLISHED`.
        recipe: base[+shrink][+preclip][+clip].
        lr: peak learning rate; by default the recipe's own.

    Raises:
        LabError: model or recipe is unknown, or a parameter's role cannot be told.
    """
    from spectrim.optim.describe import describe

    return describe(optimizer_on_meta(build_on_meta(model), model, recipe, lr=lr))


def plan_scaling(
    model: str, recipes: Sequence[str], cluster: Cluster, hardware: Hardware
) -> tuple[float, list[Projection]]:
    """Project the cost of recipes on many ranks; returns the parameters active per token, and a projection per recipe.

    Args:
        model: as for :func:`plan`.
        recipes: of this library; the communication of external optimizers is unknown.
        cluster: the ranks, and how parameters lie on them.
        hardware: decides the time of a step of training.

    Raises:
        LabError: model or recipe is unknown, or a parameter's role cannot be told.
    """
    from spectrim.optim.optimizer import SpectralOptimizer

    built = build_on_meta(model)
    projections, active = [], 0.0
    for recipe in recipes:
        optimizer = optimizer_on_meta(built, model, recipe)
        if not isinstance(optimizer, SpectralOptimizer):
            raise LabError(f"recipe {recipe!r}: what {type(optimizer).__name__} costs on many ranks is not known here")
        work = read_work(optimizer)
        active = active_parameters(built, work)
        projections.append(project(recipe, work, cluster, hardware, active=active))
    return active, projections


def optimizer_on_meta(
    built: "nn.Module", model: str, recipe: str, *, lr: float | None = None
) -> "torch.optim.Optimizer":
    """The recipe's optimizer over a model on the meta device; the model's name is for messages."""
    from spectrim.lab.config import TrainConfig
    from spectrim.lab.recipes.names import build_optimizer, resolve

    config = resolve(TrainConfig.parse({"recipe": recipe, "optimizer": {"lr": lr}}, source="options"))
    try:
        return build_optimizer(built, config)
    except ValueError as error:
        raise LabError(f"model {model!r}, recipe {recipe!r}: {error}") from None


def build_on_meta(model: str) -> "nn.Module":
    """The model that a preset, a published shape, a model type or a configuration names, on the meta device."""
    import torch

    from spectrim.lab.config import DEFAULT_VOCABULARY_SIZE, DataConfig
    from spectrim.lab.models.architecture import PRESETS
    from spectrim.lab.models.build import build_model

    with torch.device("meta"):
        if model in PRESETS:
            length = DataConfig().sequence_length
            return build_model(model, vocabulary_size=DEFAULT_VOCABULARY_SIZE, sequence_length=length, seed=0)
        return from_configuration(model, read_configuration(model))


def read_configuration(model: str) -> Any:
    """The configuration of transformers that a path, a published shape or a model type names."""
    from spectrim.lab.huggingface import quiet_transformers
    from spectrim.lab.models.architecture import PRESETS

    transformers = quiet_transformers()
    path = Path(model)
    if path.exists():
        try:
            return transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise LabError(f"model {model!r} is not a configuration of transformers: {first_line(error)}") from None
    if model in PUBLISHED:
        shape = PUBLISHED[model]
        return transformers.CONFIG_MAPPING[shape.model_type](**shape.settings, architectures=[shape.architecture])
    types = list(transformers.CONFIG_MAPPING)
    if model not in types:
        close = difflib.get_close_matches(model, [*PRESETS, *PUBLISHED, *types], n=3)
        hint = f"; close to it: {', '.join(close)}" if close else ""
        raise LabError(
            f"unknown model {model!r}, expected a preset ({', '.join(PRESETS)}), a published shape "
            f"({', '.join(PUBLISHED)}), a model type of transformers or the path of a config.json{hint}"
        )
    return transformers.CONFIG_MAPPING[model]()


def from_configuration(model: str, config: Any) -> "nn.Module":
    """The architecture that the configuration names, or the first auto class that knows the configuration."""
    from spectrim.lab.huggingface import quiet_transformers

    transformers = quiet_transformers()
    named = next(iter(config.architectures or ()), None)
    architecture = getattr(transformers, named, None) if named else None
    autos = (getattr(transformers, name) for name in AUTO_CLASSES)
    auto = next((auto for auto in autos if type(config) in auto._model_mapping), None)
    build = architecture or (auto and auto.from_config)
    if build is None:
        raise LabError(f"model {model!r}: no architecture of transformers builds {type(config).__name__}")
    try:
        built: nn.Module = build(config)
    except Exception as error:
        # A model's constructor may fail in any way on a configuration that does not fit it.
        raise LabError(f"model {model!r} cannot be built: {type(error).__name__}: {first_line(error)}") from error
    return built


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
