"""``spectrim plan``: what a recipe would do to every parameter of a model, before anything is allocated or trained.

The model is built on the meta device, so that a model of any size is planned in seconds. The table is that of
:func:`spectrim.describe`. torch and transformers are imported only once they are needed.
"""

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectrim.lab.errors import LabError

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from spectrim.optim.describe import Description

__all__ = ["plan", "plan_command"]

AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForImageTextToText",
    "AutoModelForImageClassification",
    "AutoModel",
)
"""Where a configuration names no architecture: the first that knows it."""


def plan(model: str, recipe: str, *, lr: float | None = None) -> "Description":
    """What a recipe does to every parameter of a model, without allocating a weight.

    Args:
        model: a preset of the lab, a model type of transformers in its default size, or a configuration of
            transformers: a ``config.json`` or a folder that holds one.
        recipe: base[+shrink][+preclip][+clip].
        lr: peak learning rate; by default the recipe's own.

    Raises:
        LabError: model or recipe is unknown, or a parameter's role cannot be told.
    """
    from spectrim.lab.config import TrainConfig
    from spectrim.lab.recipes import build_optimizer, resolve
    from spectrim.optim.describe import describe

    config = resolve(TrainConfig.parse({"recipe": recipe, "optimizer": {"lr": lr}}, source="options"))
    built = build_on_meta(model)
    try:
        return describe(build_optimizer(built, config))
    except ValueError as error:
        raise LabError(f"model {model!r}, recipe {recipe!r}: {error}") from None


def plan_command(
    model: Annotated[
        str, typer.Option(help="Preset of the lab, model type of transformers, config.json or a folder with one.")
    ] = "2m",
    recipe: Annotated[
        str, typer.Option(help="base[+shrink][+preclip][+clip], for example adamw, adamw+clip, spectra, muon.")
    ] = "adamw+clip",
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; default: the recipe's own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.")] = False,
) -> None:
    """Show what a recipe would do to every parameter of a model, without building its weights."""
    description = plan(model, recipe, lr=lr)
    if as_json:
        print(json.dumps({"model": model, "recipe": recipe, **description.to_dict()}, indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console()
    table = plan_table(description)
    if not console.is_terminal:
        # A file or a pipe has no width: give every row its line.
        console = Console(width=console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)


def plan_table(description: "Description") -> "Table":
    """The rows of a description, with the totals below."""
    from rich.table import Table
    from rich.text import Text

    header, *rows = description.cells()
    table = Table(caption=Text(description.summary()), caption_justify="left")
    for title in header:
        table.add_column(title, justify="right" if title in ("lr", "decay", "state bytes") else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def build_on_meta(model: str) -> "nn.Module":
    """The model that a preset, a model type or a configuration names, on the meta device."""
    import torch

    from spectrim.lab.config import DEFAULT_VOCABULARY_SIZE, DataConfig
    from spectrim.lab.model import PRESETS, build_model

    with torch.device("meta"):
        if model in PRESETS:
            length = DataConfig().sequence_length
            return build_model(model, vocabulary_size=DEFAULT_VOCABULARY_SIZE, sequence_length=length, seed=0)
        return from_configuration(model, read_configuration(model))


def read_configuration(model: str) -> Any:
    """The configuration of transformers that a path or a model type names."""
    from spectrim.lab.model import PRESETS, quiet_transformers

    transformers = quiet_transformers()
    path = Path(model)
    if path.exists():
        try:
            return transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise LabError(f"model {model!r} is not a configuration of transformers: {first_line(error)}") from None
    types = list(transformers.CONFIG_MAPPING)
    if model not in types:
        close = difflib.get_close_matches(model, [*PRESETS, *types], n=3)
        hint = f"; close to it: {', '.join(close)}" if close else ""
        raise LabError(
            f"unknown model {model!r}, expected a preset ({', '.join(PRESETS)}), a model type of transformers "
            f"or the path of a config.json{hint}"
        )
    return transformers.CONFIG_MAPPING[model]()


def from_configuration(model: str, config: Any) -> "nn.Module":
    """The architecture that the configuration names, or the first auto class that knows the configuration."""
    from spectrim.lab.model import quiet_transformers

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
