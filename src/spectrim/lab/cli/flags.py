"""Flags derived from settings: name, type, help and default of a flag come from the field of the pydantic model.

A setting comes from its flag, else from the file of ``--config`` (or the stored configuration with ``--resume``), else
from its default. This module adds the themes that ``--help`` groups flags by, and flags whose spelling differs from
their setting.
"""

import inspect
import tomllib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from spectrim.lab.config import TrainConfig
from spectrim.lab.errors import LabError
from spectrim.lab.experiments.settings import ALL
from spectrim.lab.settings import Config, merge, read_toml

__all__ = ["RECIPE_HELP", "configure", "parse_numbers", "trust_named", "with_settings"]

RECIPE_HELP = TrainConfig.model_fields["recipe"].description

THEMES = {
    "Experiment": (
        "budget",
        "only",
        "recipe",
        "recipes",
        "seed",
        "seeds",
        "equal",
        "seconds",
        "trials",
        "pruner",
        "space",
        "overrides",
    ),
    "Optimizer": (
        *("lr", "embedding_lr", "head_lr", "clip_bound"),
        *("optimizer.lr", "optimizer.embedding_lr", "optimizer.head_lr", "optimizer.clip_bound"),
        *("optimizer.gradient_clip", "schedule.shape"),
    ),
    "Training": (
        *("steps", "data.batch_size", "data.sequence_length"),
        *("accumulate", "precision", "device", "checkpoint_every"),
    ),
    "Text": ("data.sources", "data.text_column", "data.tokenizer", "data.vocabulary_size"),
    "Model": ("model.preset", "model.architecture", "model.weights"),
}
"""Settings with a flag, by the theme in ``--help``; ``--set`` sets all others."""


@dataclass(frozen=True)
class Spelling:
    """The spelling of a flag that differs from its setting's name."""

    flag: str
    metavar: str | None = None
    parse: Callable[[str, Any], Any] | None = None
    """Turns the flag's name and its text into the setting's value."""


def with_settings(
    model: type[Config], themes: Mapping[str, Iterable[str]] = THEMES, *, default: str = ""
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a flag for each setting of a model.

    The command receives the given settings by dotted key, and its own options.

    Args:
        model: declares the settings.
        themes: keys of the settings with a flag, by their heading in ``--help``. The default also adds ``--set``.
        default: shown in place of the settings' own defaults, where the command has another.
    """
    flags: dict[str, tuple[str, Annotated[Any, "parameter"], Callable[[Any], Any]]] = {}
    for theme, keys in themes.items():
        for key in keys:
            place, name = find(model, key), key.rpartition(".")[2]
            if place is not None and name not in flags:
                flags[name] = (key, *parameter(key, *place, theme=theme, default=default))

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**values: Any) -> None:
            words = {name: values.pop(name) for name in flags}
            given = {flags[name][0]: flags[name][2](word) for name, word in words.items() if word not in (None, [])}
            command(given | parse_settings(values.pop("set_", None), given), **values)

        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        derived = {name: annotation for name, (_, annotation, _) in flags.items()}
        if "Experiment" in themes:
            derived["set_"] = AnySetting
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [inspect.Parameter(name, keyword, default=None, annotation=kind) for name, kind in derived.items()]
        run.__signature__ = inspect.Signature([*parameters, *(each.replace(kind=keyword) for each in own)])  # type: ignore[attr-defined]
        paragraphs = (inspect.getdoc(command) or "").split("\n\n")
        run.__doc__ = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)  # --help wraps lines itself
        return run

    return decorate


AnySetting = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        rich_help_panel="Experiment",
        help="Any setting of config.toml, its value as in TOML, such as schedule.decay_fraction=0.3; repeatable.",
    ),
]


def find(model: type[Config], key: str) -> tuple[FieldInfo, Any] | None:
    """The field of a dotted key and its default in this model; None if the model has no such field."""
    *tables, name = key.split(".")
    section: Any = None
    for table in tables:
        if table not in model.model_fields:
            return None
        section = model.model_fields[table].default
        model = type(section)
    field = model.model_fields.get(name)
    return field and (field, getattr(section, name) if section is not None else field.default)


def parameter(key: str, field: FieldInfo, value: Any, *, theme: str, default: str) -> tuple[Any, Callable[[Any], Any]]:
    """The annotation of a flag for typer, and a function from its word to the setting's value."""
    name = key.rpartition(".")[2]
    spelling = SPELLINGS.get(key) or SPELLINGS.get(name) or Spelling("--" + name.replace("_", "-"))
    kind, choices, parse = kind_of(field, spelling.flag)
    parse = spelling.parse or parse
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    shown = default or extra.get("default") or show_default(value)
    text = " ".join((field.description or "").split())
    if kind is str and choices and not spelling.metavar and get_origin(field.annotation) is tuple:
        text += f" Separated by commas, or all: {', '.join(choices)}."
        choices = ()
    text += " Repeatable." if get_origin(kind) is list and not key.startswith("recipe") else ""
    if key in ("recipe", "recipes") and theme == "Experiment":
        info: Any = typer.Argument(metavar="RECIPE" if kind is str else "[RECIPE]...", help=RECIPE_HELP)
    else:
        text += f" [dim]\\[default: {shown}][/dim]" if shown and kind is not bool else ""
        metavar = spelling.metavar or "|".join(choices) or None
        info = typer.Option(spelling.flag, metavar=metavar, help=text, rich_help_panel=theme)
    return Annotated[kind | None, info], (lambda given: parse(spelling.flag, given)) if parse else lambda given: given


def kind_of(field: FieldInfo, flag: str) -> tuple[Any, tuple[str, ...], Callable[[str, Any], Any] | None]:
    """The type that typer reads a flag's word as, its choices, and a function that parses it further."""
    kind: Any = field.annotation
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(part for part in get_args(kind) if part is not types.NoneType)
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if any(isinstance(check, BeforeValidator) for check in field.metadata):
        return str, (), None
    if get_origin(kind) is Literal:
        return str, get_args(kind), None
    if get_origin(kind) is dict:
        return list[str], (), parse_rates
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        item = get_args(item)[0] if get_origin(item) is Annotated else item
        if get_origin(item) is Literal:
            choices = get_args(item)
            return str, choices, lambda flag, text: parse_choices(flag, text, choices)
        return (str, (), parse_numbers) if item is int else (types.GenericAlias(list, (item,)), (), None)
    return kind, (), None


def show_default(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}" if value >= 1e6 else str(value)
    return "none" if value in (None, {}) else str(value)


def parse_settings(items: list[str] | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The KEY=VALUE of --set, by key; none may be among the flags that were ``given``."""
    settings: dict[str, Any] = {}
    form = "KEY=VALUE, such as schedule.decay_fraction=0.3"
    for key, text, wrong in assignments("--set", items or [], form, taken=given):
        if not all(part.isidentifier() for part in key.split(".")):
            raise wrong
        settings[key] = parse_value(text)
    return settings


def trust_named(given: Mapping[str, Any], everything: bool) -> None:
    """Allow the import of external recipes on the command line; with ``everything``, also of those in files."""
    from spectrim.lab.recipes import external

    named = [given.get("recipe"), *(given.get("recipes") or ())]
    external.trust([external.ANY] if everything else [name for name in named if isinstance(name, str)])


AnyConfig = TypeVar("AnyConfig", bound=Config)


def configure(
    model: type[AnyConfig], file: Path | None, given: dict[str, Any], *, below: dict[str, Any] | None = None
) -> AnyConfig:
    """The configuration of a file, if any, with the given settings on top; "data.sources" is a nested key."""
    values = read_toml(file) if file else dict(below or {})
    # An error in a setting names the file if there is one, since flags may complete it.
    source = f"config {str(file)!r}" if file else "options"
    for key, value in given.items():
        *tables, last = key.split(".")
        target = values
        for table in tables:
            target = target.setdefault(table, {})
            if not isinstance(target, dict):
                raise LabError(f"{source}: {table}={target!r}: expected a table")
        target[last] = value
    return model.parse(values, source=source)


def parse_choices(flag: str, text: str, choices: tuple[str, ...]) -> list[str]:
    """Some of the choices, separated by commas, or "all"."""
    values = list(choices) if text == "all" else [value.strip() for value in text.split(",")]
    for value in values:
        if value not in choices:
            raise LabError(f"{flag} {value!r}: expected {', '.join(choices)}, or all")
    return values


def parse_numbers(flag: str, text: str) -> list[int]:
    """Whole numbers from 0, separated by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise LabError(f"{flag} {text!r}: expected whole numbers separated by commas, such as 0,1,2") from None


def assignments(
    flag: str, items: list[str], form: str, *, taken: Iterable[str] = ()
) -> Iterator[tuple[str, str, LabError]]:
    """Yield left and right of every LEFT=RIGHT, and the error to raise if they do not have the ``form``."""
    seen = set(taken)
    for item in items:
        left, equals, right = item.partition("=")
        wrong = LabError(f"{flag} {item!r}: expected {form}")
        if not equals or not left:
            raise wrong
        if left in seen:
            raise LabError(f"{flag} {item!r}: {left} is given twice")
        seen.add(left)
        yield left, right, wrong


def parse_rates(flag: str, items: list[str]) -> dict[str, float]:
    """RECIPE=VALUE, each recipe once."""
    rates = {}
    for recipe, text, wrong in assignments(flag, items, "RECIPE=VALUE, such as adamw=0.003"):
        try:
            rates[recipe] = float(text)
        except ValueError:
            raise wrong from None
    return rates


def parse_overrides(flag: str, items: list[str]) -> dict[str, dict[str, Any]]:
    """RECIPE.KEY=VALUE, the value as TOML or else as a string; a key such as arguments.betas is nested."""
    overrides: dict[str, Any] = {}
    for left, text, wrong in assignments(flag, items, "RECIPE.KEY=VALUE, such as spectra.rank_ratio=0.03"):
        recipe, key = split_key(left)
        if not recipe or not key:
            raise wrong
        value = parse_value(text)
        for part in reversed(key.split(".")):
            value = {part: value}
        overrides = merge(overrides, {recipe: value})
    return overrides


def parse_spaces(flag: str, items: list[str]) -> dict[str, dict[str, str]]:
    """[RECIPE.]KEY=RANGE by recipe; without a recipe it is for all of them."""
    spaces: dict[str, dict[str, str]] = {}
    form = "[RECIPE.]KEY=RANGE, such as lr=1e-4:1e-2 or spectra.momentum=0.9,0.95"
    for left, text, wrong in assignments(flag, items, form):
        if not text:
            raise wrong
        recipe, key = split_key(left)
        spaces.setdefault(recipe or ALL, {})[key] = text
    return spaces


def split_key(text: str) -> tuple[str, str]:
    """Split RECIPE.KEY; the recipe is empty if the text starts with a table such as arguments."""
    path, colon, rest = text.rpartition(":")
    recipe, _, key = rest.partition(".")
    if not key or (not colon and recipe == "arguments"):
        return "", text
    return path + colon + recipe, key


def parse_value(text: str) -> Any:
    """Parse a TOML value; text that is not TOML is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


SPELLINGS = {
    "data.sources": Spelling("--data", "SOURCE[@WEIGHT]"),
    "sources": Spelling("--data", "SOURCE"),
    "model.architecture": Spelling("--model"),
    "schedule.shape": Spelling("--schedule"),
    "seeds": Spelling("--seeds", "N,N,...", parse_numbers),
    "layers": Spelling("--layers", "N,N,..."),
    "parameters": Spelling("--parameters", "PATTERN"),
    "thresholds": Spelling("--threshold"),
    "overrides": Spelling("--override", "RECIPE.KEY=VALUE", parse_overrides),
    "space": Spelling("--space", "[RECIPE.]KEY=RANGE", parse_spaces),
    "solvers": Spelling("--solver"),
    "dtypes": Spelling("--dtype"),
    "spectra": Spelling("--spectrum"),
    "json_path": Spelling("--json"),
}
"""Flags that are not spelled as their setting, by its dotted key or its last part."""
