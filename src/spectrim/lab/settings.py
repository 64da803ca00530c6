"""The base class of all settings: frozen pydantic models that validate TOML files and flags.

Imports no torch, nor does any module that declares settings, so that ``--help`` answers at once.
"""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spectrim.lab.errors import LabError

__all__ = [
    "Config",
    "Count",
    "PositiveFloat",
    "PositiveInt",
    "Seed",
    "describe_differences",
    "differences",
    "is_text",
    "merge",
    "read_toml",
    "unset",
]

PositiveInt = Annotated[int, Field(ge=1, le=2**53)]
Count = Annotated[int, Field(ge=0, le=2**53)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


def unset(default: str, **limits: Any) -> Any:
    """A field whose default is None; ``default`` describes the actual default for ``--help``."""
    return Field(default=None, json_schema_extra={"default": default}, **limits)


class Config(BaseModel):
    """Frozen settings that refuse unknown keys. The docstring below a field is its help on the command line."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def parse(cls, values: dict[str, Any], *, source: str) -> Self:
        """Validate ``values``; an error names the key, the value and what is allowed, in one line.

        Raises:
            LabError: a key is unknown or missing, or a value is out of range. The message begins with ``source``.
        """
        for key, value in leaves(values):
            if isinstance(value, str) and not is_text(value):
                raise LabError(f"{source}: {key}={value!r} is not UTF-8 and could not be written down; rename it")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise LabError(f"{source}: {explain(cls, error)}") from None

    def to_toml(self) -> str:
        """The settings as TOML, one table for each section; an unset value is left out."""
        return toml(self.model_dump(mode="json"))


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file as nested dictionaries.

    Raises:
        LabError: the file is missing or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LabError(f"config {str(path)!r}: {error.strerror}") from None
    except RecursionError:
        raise LabError(f"config {str(path)!r} is nested too deeply") from None
    except ValueError as error:
        raise LabError(f"config {str(path)!r} is not TOML: {str(error).partition(';')[0]}") from None


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge two nested dictionaries into a new one; the second wins."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def differences(stored: Config, asked: Config) -> Iterator[tuple[str, Any, Any]]:
    """Yield every dotted key whose values differ, with the stored and the new value.

    Settings of older versions, without a monitor, count as equal in it.
    """
    if "monitor" in type(stored).model_fields.keys() - stored.model_fields_set:
        asked = asked.model_copy(update={"monitor": getattr(stored, "monitor")})  # noqa: B009 - not of every Config
    old, new = dict(leaves(stored.model_dump(mode="json"))), dict(leaves(asked.model_dump(mode="json")))
    for key in old | new:
        if old.get(key) != new.get(key):
            yield key, old.get(key), new.get(key)


def describe_differences(stored: Config, asked: Config) -> str:
    """The differences for an error message; empty if there are none."""
    return "; ".join(f"{key} is {old!r} there, {new!r} here" for key, old, new in differences(stored, asked))


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def is_text(value: str) -> bool:
    """True if a string can be encoded as UTF-8; a file's name need not be."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def explain(model: type[BaseModel], error: ValidationError) -> str:
    """The first problem that pydantic found, as one line."""
    problem = error.errors(include_url=False)[0]
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        for part in path[:-1]:
            annotation = model.model_fields[part].annotation
            assert isinstance(annotation, type)
            model = annotation
        return f"unknown key {key!r}, expected one of {', '.join(model.model_fields)}"
    if problem["type"] == "missing":
        return f"key {key!r} is missing"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):
        # The message of a check of several keys names them itself.
        return f"{key + ': ' if key else ''}{message.removeprefix('value error, ')}"
    return f"{key}={problem['input']!r}: {message.removeprefix('value error, ')}"


def toml(tree: dict[str, Any]) -> str:
    """Nested dictionaries of plain values as TOML; values of None and empty tables are left out."""

    def given(tree: dict[str, Any]) -> dict[str, Any]:
        plain = {key: given(value) if isinstance(value, dict) else value for key, value in tree.items()}
        return {key: value for key, value in plain.items() if value is not None and value != {}}

    return tomli_w.dumps(given(tree))
