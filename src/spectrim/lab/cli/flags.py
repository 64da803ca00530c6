"""From the words of a command line to a configuration, and from a result to what is printed.

A setting is looked up in this order: a flag, the file of ``--config`` (or the stored configuration with ``--resume``),
the default. Relied on by the modules of commands.
"""

import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spectrim.lab.errors import LabError

__all__ = [
    "check_name",
    "configure",
    "parse_overrides",
    "parse_rates",
    "parse_seeds",
    "parse_value",
    "show",
    "split_key",
    "trust_named",
    "with_settings",
]


def check_name(name: str) -> None:
    """Refuse a name that is more than one folder's."""
    if not name or name.startswith(".") or Path(name).name != name or not name.isprintable():
        raise LabError(f"--name {name!r}: expected a plain folder name; --runs-dir says where it lies")


def with_settings(flags: dict[str, Any], settings: list[str] | None) -> dict[str, Any]:
    """Flags and the KEY=VALUE of --set together; a value is TOML, and a bare word is a string."""
    given = {key: value for key, value in flags.items() if value is not None}
    for item in settings or []:
        key, equals, text = item.partition("=")
        if not equals or not all(part.isidentifier() for part in key.split(".")):
            raise LabError(f"--set {item!r}: expected KEY=VALUE, such as schedule.decay_fraction=0.3")
        if key in given:
            raise LabError(f"--set {item!r}: {key} is given twice")
        given[key] = parse_value(text)
    return given


def trust_named(given: Mapping[str, Any], everything: bool) -> None:
    """Let the code be run of the recipes that a command line names, or with ``everything`` of those in its files."""
    from spectrim.lab.recipes import external

    named = [given.get("recipe"), *(given.get("recipes") or ())]
    external.trust([external.ANY] if everything else [name for name in named if isinstance(name, str)])


def configure(model: Any, file: Path | None, flags: dict[str, Any], *, below: dict[str, Any] | None = None) -> Any:
    """The configuration of a file, if any, under the flags that are set; a key such as "data.sources" is nested."""
    from spectrim.lab.config import read_toml

    values = read_toml(file) if file else dict(below or {})
    # Flags may complete a file, so only what the file does hold is checked in its name.
    source = f"config {str(file)!r}" if file else "options"
    for key, value in flags.items():
        if value is not None:
            *tables, last = key.split(".")
            target = values
            for table in tables:
                target = target.setdefault(table, {})
                if not isinstance(target, dict):
                    raise LabError(f"{source}: {table}={target!r}: expected a table")
            target[last] = value
    return model.parse(values, source=source)


def parse_seeds(text: str | None) -> list[int] | None:
    """Whole numbers separated by commas."""
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise LabError(f"--seeds {text!r}: expected whole numbers separated by commas, such as 0,1,2") from None


def parse_rates(flag: str, items: list[str] | None) -> dict[str, float] | None:
    """RECIPE=VALUE, each recipe once."""
    if not items:
        return None
    rates: dict[str, float] = {}
    for item in items:
        recipe, _, value = item.partition("=")
        try:
            number = float(value)
        except ValueError:
            raise LabError(f"{flag} {item!r}: expected RECIPE=VALUE, such as adamw=0.003") from None
        if recipe in rates:
            raise LabError(f"{flag} {item!r}: {recipe} stands twice")
        rates[recipe] = number
    return rates


def parse_overrides(items: list[str] | None) -> dict[str, dict[str, Any]] | None:
    """RECIPE.KEY=VALUE, the value as TOML or else as a string; a key such as arguments.betas is nested."""
    overrides: dict[str, Any] = {}
    for item in items or []:
        left, equals, text = item.partition("=")
        recipe, key = split_key(left)
        if not equals or not recipe or not key:
            raise LabError(f"--override {item!r}: expected RECIPE.KEY=VALUE, such as spectra.rank_ratio=0.03")
        *tables, last = key.split(".")
        target = overrides.setdefault(recipe, {})
        for table in tables:
            target = target.setdefault(table, {})
        if last in target:
            raise LabError(f"--override {item!r}: {left} stands twice")
        target[last] = parse_value(text)
    return overrides or None


def split_key(text: str) -> tuple[str, str]:
    """RECIPE.KEY in its parts, the recipe empty where there is none: tables are no recipes."""
    path, colon, rest = text.rpartition(":")
    recipe, _, key = rest.partition(".")
    if not key or (not colon and recipe == "arguments"):
        return "", text
    return path + colon + recipe, key


def parse_value(text: str) -> Any:
    """A value as TOML has it; what is none is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def show(value: Any, as_json: bool, table: Callable[[], Any]) -> None:
    """Print a value as JSON, or as the table that ``table`` makes of it."""
    if as_json:
        from spectrim.lab.files import finite

        print(json.dumps(finite(value), indent=2, ensure_ascii=False))
    else:
        from rich.console import Console

        # A file or a pipe has no width; wide enough for every table of the lab.
        console = Console(emoji=False, markup=False)
        width = console.width if console.is_terminal else 120
        Console(width=width, emoji=False, markup=False).print(table())
