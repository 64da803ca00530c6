"""What the monitor measured in a run: its records read back, and names of matrices that can be read.

A record is what :class:`spectrim.SpectralMonitor` writes: a line of ``monitor.jsonl``.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectrim.lab.files import read_lines

__all__ = ["MonitorRecord", "MonitoredRun", "layer_of", "read_measurements", "short_names"]

MonitorRecord = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class MonitoredRun:
    """What was measured over one run."""

    name: str
    """Of the recipe, or whatever its curves are to be called."""
    index: int
    """Its place among those that are drawn together, which has a colour."""
    records: Sequence[MonitorRecord]


def read_measurements(path: Path) -> list[MonitorRecord]:
    """Every complete record of a file; none where there is no file."""
    if not path.is_file():
        return []
    return read_lines(path)


def layer_of(name: str) -> tuple[int | None, str]:
    """The number of the layer that a parameter is in, and its name there.

    ``"model.layers.2.mlp.up_proj.weight"`` is ``(2, "mlp.up_proj")``; what is in no layer has None, and loses but the
    outermost module's name.
    """
    name = re.sub(r"\.weight(?=(\[\d+\])?$)", "", name)
    if match := re.match(r"(?:[^.]+\.)*?(\d+)\.(.+)$", name):
        return int(match[1]), match[2]
    return None, re.sub(r"^(model|transformer)\.", "", name)


def short_names(names: Iterable[str], *, digits: int = 1) -> dict[str, str]:
    """What to call matrices in a figure or on a terminal; two of the same short name keep their long ones.

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
