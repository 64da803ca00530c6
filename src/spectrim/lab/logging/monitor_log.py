"""Reads the records that a run's monitor wrote, and shortens names of matrices.

A record is what :class:`spectrim.SpectralMonitor` writes: a line of ``monitor.jsonl``.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectrim.lab.files import read_lines

__all__ = ["MonitorRecord", "MonitoredRun", "layer_of", "read_measurements", "short_names", "values_in_layers"]

MonitorRecord = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class MonitoredRun:
    """The records of one run's monitor."""

    name: str
    """The name of its curves, such as the recipe's."""
    index: int
    """Its place among the runs of a figure, which decides its colour."""
    records: Sequence[MonitorRecord]


def read_measurements(path: Path) -> list[MonitorRecord]:
    """The complete records of a file; none if there is no file."""
    if not path.is_file():
        return []
    return read_lines(path)


def layer_of(name: str) -> tuple[int | None, str]:
    """The number of the layer that a parameter is in, and its name there.

    ``"model.layers.2.mlp.up_proj.weight"`` is ``(2, "mlp.up_proj")``; outside of layers the number is None, and only
    the outermost module's name is dropped.
    """
    name = re.sub(r"\.weight(?=(\[\d+\])?$)", "", name)
    if match := re.match(r"(?:[^.]+\.)*?(\d+)\.(.+)$", name):
        return int(match[1]), match[2]
    return None, re.sub(r"^(model|transformer)\.", "", name)


def values_in_layers(record: MonitorRecord, key: str) -> list[float]:
    """A quantity of every matrix in a layer, or of all matrices if none is in a layer."""
    parameters = record["parameters"]
    inside = [name for name in parameters if layer_of(name)[0] is not None] or list(parameters)
    return [value for name in inside if (value := parameters[name].get(key)) is not None]


def short_names(names: Iterable[str], *, digits: int = 1) -> dict[str, str]:
    """Short names of matrices for figures and the terminal; names that would be equal stay long.

    Args:
        names: of parameters.
        digits: that a layer's number has at least, so that layers sort as text.
    """
    short: dict[str, str] = {}
    for name in names:
        layer, rest = layer_of(name)
        short[name] = rest if layer is None else f"layer {layer:0{digits}d} · {rest}"
    taken = list(short.values())
    return {name: each if taken.count(each) == 1 else name for name, each in short.items()}
