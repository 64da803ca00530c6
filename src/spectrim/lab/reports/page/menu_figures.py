"""Figures with menus and sliders: a line for every run at every choice, and a dotted one for its bound."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import unescape
from itertools import product
from typing import Any

from spectrim.lab.logging.monitor_log import MonitoredRun, MonitorRecord, layer_of, short_names
from spectrim.lab.reports.page.figures import colour, layout, scatter, stroke
from spectrim.lab.reports.page.html import Control, Figure, Frame, Menus, Table

__all__ = ["looks_of", "matrix_menu", "menu_figure", "rounded", "stages_of", "thinned"]

POINTS = 32
"""The most points of a spectrum that are drawn, evenly spread on a logarithmic axis of ranks."""

FLOOR = 1e-6
"""Singular values below this share of the largest one are rounding errors, and are not drawn."""


def menu_figure(
    looks: Sequence[dict[str, Any]],
    controls: Sequence[Control],
    frame_of: Callable[..., Frame | None],
    *,
    tabled: int,
    title: str,
    alt: str,
    x: dict[str, Any],
    first: str,
    ranks: bool = False,
    note: str = "",
    **layouts: Any,
) -> Figure | None:
    """A figure with controls, as it is shown at first; None if nothing was measured.

    Args:
        looks: a trace without data for every curve of a frame (:func:`looks_of`).
        controls: the menus and sliders.
        frame_of: the frame at one option of every control; None if it was not measured.
        tabled: the number of traces, from the first, that the table shows.
        title: of the figure.
        alt: describes the figure to screen readers; its first choice is added.
        x: the horizontal axis.
        first: heading of the horizontal axis in the table of numbers.
        ranks: the horizontal axis shows ranks, on a logarithmic scale.
        note: below the figure.
        layouts: more of plotly's layout.
    """
    keys = product(*(range(len(control.options)) for control in controls))
    frames = {key: frame for key in keys if (frame := frame_of(*key))}
    if not frames:
        return None
    choices = Menus(controls=controls, frames=frames, tabled=tabled)
    start = frames.get(choices.start) or next(iter(frames.values()))
    traces = []
    for look, curve in zip(looks, start.curves, strict=True):
        places, values = curve or ([], [])
        mode = look.get("mode") or ("lines+markers" if len(places) < 12 else "lines")
        traces.append({**look, "x": list(places), "y": list(values), "mode": mode})
    axis = dict(start.axis)
    y = {"title": axis.pop("title.text"), **axis}
    named = [unescape(look["name"]) for look in looks[:tabled]]
    columns = [dict(zip(*curve, strict=True)) if curve else {} for curve in start.curves[:tabled]]
    at = sorted({place for column in columns for place in column})
    rows = [[str(place), *(text(column.get(place)) for column in columns)] for place in at]
    x = {**x, "type": "log", **rank_ticks(frames)} if ranks else x
    return Figure(
        title=title,
        alt=f"{alt} At first {choices.words}.{endings(named, frames.get(choices.start))}",
        drawing={"data": traces, "layout": layout(x=x, y=y, **{"hovermode": "x unified", **layouts})},
        numbers=Table(caption=f"{title}: {choices.words}", rows=[[first, *named], *rows]),
        note=note,
        choices=choices,
    )


def looks_of(runs: Sequence[MonitoredRun], *, limits: bool = False) -> list[dict[str, Any]]:
    """Traces without data for the runs' lines; with ``limits``, also a dotted line for the bound of each."""
    lines = [
        scatter(run.index, run.name, (), (), hover="%{y:.3g}", line=stroke(run.index), marker={"size": 6}, mode="")
        for run in runs
    ]
    dotted = [
        scatter(run.index, run.name, (), (), line={"color": colour(run.index), "width": 1.5, "dash": "dot"})
        for run in runs
    ]
    return [*lines, *(dotted if limits else ())]


def text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def endings(names: Sequence[str], frame: Frame | None) -> str:
    """The ends of every line, in words."""
    words = ""
    for name, curve in zip(names, frame.curves if frame else (), strict=False):
        known = [value for value in curve[1] if value is not None] if curve else []
        words += f" {name} goes from {known[0]:.3g} to {known[-1]:.3g}." if known else ""
    return words


def matrix_menu(names: Sequence[str]) -> Control:
    """A menu of matrices. It begins with the feed-forward one of the middle layer, which is the largest."""
    short = short_names(names)
    layers = sorted({layer for name in names if (layer := layer_of(name)[0]) is not None})
    middle = [index for index, name in enumerate(names) if layers and layer_of(name)[0] == layers[len(layers) // 2]]
    start = next((index for index in middle if "up" in names[index] or "fc" in names[index]), (*middle, 0)[0])
    return Control(label="Matrix", options=[short[name] for name in names], start=start)


def thinned(spectrum: Sequence[float | None]) -> tuple[list[int], list[float | None]]:
    """At most :data:`POINTS` ranks of a spectrum with their singular values; None for those that are rounding alone."""
    count, floor = len(spectrum), FLOOR * max(value or 0.0 for value in spectrum)
    places = sorted({round(count ** (index / (POINTS - 1))) for index in range(POINTS)})
    chosen = [spectrum[place - 1] for place in places]
    return places, [rounded(value) if value and value >= floor else None for value in chosen]


def rounded(value: float | None) -> float | None:
    """Round to four digits; a logarithmic axis shows positive values only."""
    return float(f"{value:.4g}") if value is not None and value > 0 else None


def rank_ticks(frames: Mapping[tuple[int, ...], Frame]) -> dict[str, Any]:
    last = max(int(curve[0][-1]) for frame in frames.values() for curve in frame.curves if curve)
    ticks = [digit * 10**power for power in range(len(str(last))) for digit in (1, 2, 5)]
    return {"tickvals": ticks, "ticktext": list(map(str, ticks)), "range": [-0.02, math.log10(last) + 0.02]}


def stages_of(runs: Sequence[Sequence[MonitorRecord]]) -> tuple[Control, list[list[MonitorRecord | None]]]:
    """A slider through the stages of training, and at each of them the record of every run.

    Runs that were measured after the same steps have a stage for each. Runs of different lengths have equally many
    records, and are compared by their share of training.
    """
    steps = [[record["step"] for record in records] for records in runs]
    union = sorted({step for each in steps for step in each})
    longest = max(map(len, steps))
    # A run that ended early or was first measured later shares its steps with the others.
    if longest == len(union):
        by_step = [{record["step"]: record for record in records} for records in runs]
        at = [[run.get(step) for run in by_step] for step in union]
    else:
        at = [[records[index] if index < len(records) else None for records in runs] for index in range(longest)]
    stages = []
    for present in at:
        reached = [record["step"] for record in present if record]
        low, high = min(reached), max(reached)
        stages.append(f"step {low:,}" if low == high else f"steps {low:,} to {high:,}")
    return Control(label="Stage", options=stages, start=len(stages) - 1, slider=True), at
