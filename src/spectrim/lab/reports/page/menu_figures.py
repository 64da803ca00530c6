"""Figures with menus and sliders: a line for every run at every choice, and a dotted one for its bound."""

from collections.abc import Sequence
from html import unescape
from typing import Any

from spectrim.lab.logging.monitor_log import MonitoredRun, MonitorRecord
from spectrim.lab.reports.page.figures import colour, layout, scatter, stroke
from spectrim.lab.reports.page.html import Figure, Menus, Table

__all__ = ["chosen_figure", "looks_of", "stages_of"]


def chosen_figure(
    looks: Sequence[dict[str, Any]],
    choices: Menus,
    *,
    title: str,
    alt: str,
    x: dict[str, Any],
    first: str,
    note: str = "",
    **layouts: Any,
) -> Figure:
    """A figure with controls, as it is shown at first.

    Args:
        looks: a trace without data for every curve of a frame (:func:`looks_of`).
        choices: the controls and their frames.
        title: of the figure.
        alt: describes the figure to screen readers; its first choice is added.
        x: the horizontal axis.
        first: heading of the horizontal axis in the table of numbers.
        note: below the figure.
        layouts: more of plotly's layout.
    """
    start = choices.frames.get(choices.start) or next(iter(choices.frames.values()))
    traces = []
    for look, curve in zip(looks, start.curves, strict=True):
        places, values = curve or ([], [])
        mode = look.get("mode") or ("lines+markers" if len(places) < 12 else "lines")
        traces.append({**look, "x": list(places), "y": list(values), "mode": mode})
    axis = dict(start.axis)
    y = {"title": axis.pop("title.text"), **axis}
    named = [unescape(look["name"]) for look in looks[: choices.tabled]]
    columns = [dict(zip(*curve, strict=True)) if curve else {} for curve in start.curves[: choices.tabled]]
    at = sorted({place for column in columns for place in column})
    rows = [[str(place), *(text(column.get(place)) for column in columns)] for place in at]
    return Figure(
        title=title,
        alt=f"{alt} {endings(named, choices)}",
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


def endings(names: Sequence[str], choices: Menus) -> str:
    """The first choice in words, and the ends of every line."""
    frame = choices.frames.get(choices.start)
    said = [f"At first {choices.words}."]
    for name, curve in zip(names, frame.curves if frame else (), strict=False):
        known = [value for value in curve[1] if value is not None] if curve else []
        if known:
            said.append(f"{name} goes from {known[0]:.3g} to {known[-1]:.3g}.")
    return " ".join(said)


def stages_of(runs: Sequence[Sequence[MonitorRecord]]) -> tuple[list[str], list[list[MonitorRecord | None]]]:
    """The stages that a slider goes through, and at each of them the record of every run.

    Runs that were measured after the same steps have a stage for each. Runs of different lengths have equally many
    records, and are compared by their share of training.
    """
    steps = [[record["step"] for record in records] for records in runs]
    union = sorted({step for each in steps for step in each})
    # A run that ended early or was first measured later shares its steps with the others.
    if max(map(len, steps)) == len(union):
        by_step = [{record["step"]: record for record in records} for records in runs]
        return [f"step {step:,}" for step in union], [[run.get(step) for run in by_step] for step in union]
    longest = max(map(len, steps))
    at = [[records[index] if index < len(records) else None for records in runs] for index in range(longest)]
    stages = []
    for present_at in at:
        reached = [record["step"] for record in present_at if record]
        low, high = min(reached), max(reached)
        stages.append(f"step {low:,}" if low == high else f"steps {low:,} to {high:,}")
    return stages, at
