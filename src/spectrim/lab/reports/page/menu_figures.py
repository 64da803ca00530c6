"""Figures with menus and sliders: a line for every run, at every choice, and a dotted one for what bounds it.

Relied on by pages that show what was measured through training.
"""

from collections.abc import Sequence
from typing import Any

from spectrim.lab.logging.monitor_log import MonitoredRun, MonitorRecord
from spectrim.lab.reports.page.figures import colour, dashes, layout, plain, shown
from spectrim.lab.reports.page.html import Figure, Frame, Menus, Table

__all__ = ["add_line", "chosen_figure", "endings", "stages_of"]


def chosen_figure(
    runs: Sequence[MonitoredRun],
    choices: Menus,
    *,
    title: str,
    alt: str,
    x: dict[str, Any],
    hover: str,
    mode: str,
    first: str,
    limits: bool = False,
    note: str = "",
) -> Figure:
    """A figure with controls: a line a run, and with ``limits`` a dotted one for each."""
    import plotly.graph_objects as go

    start = choices.frames.get(choices.start) or next(iter(choices.frames.values()))
    drawing = go.Figure()
    for run, curve in zip(runs, start.curves, strict=False):
        add_line(drawing, run, *(curve or ([], [])), hover=hover)
    for run, curve in zip(runs if limits else (), start.curves[len(runs) :], strict=True):
        places, values = curve or ([], [])
        drawing.add_scatter(
            x=places, y=values, mode="lines", line={"color": colour(run.index), "width": 1.5, "dash": "dot"},
            legendgroup=str(run.index), name=shown(run.name), hoverinfo="skip",
        )  # fmt: skip
    axis = dict(start.axis)
    layout(drawing, x=dict(x), y={"title": axis.pop("title.text"), **axis})
    drawing.update_layout(hovermode=mode)
    return Figure(
        title=title,
        alt=alt,
        drawing=plain(drawing),
        numbers=Table(caption=f"{title}: {choices.words}", rows=rows_of(runs, start, first)),
        note=note,
        choices=choices,
    )


def add_line(drawing: Any, run: MonitoredRun, x: Sequence[float], y: Sequence[float | None], *, hover: str) -> None:
    """Draw the line of a run as its recipe is drawn everywhere; the places of few points are marked."""
    line = {"color": colour(run.index), "dash": dashes(run.index)[0], "width": 2.25}
    drawing.add_scatter(
        x=list(x), y=list(y), mode="lines+markers" if len(x) < 12 else "lines", line=line, marker={"size": 6},
        legendgroup=str(run.index), name=shown(run.name), hovertemplate=hover,
    )  # fmt: skip


def rows_of(runs: Sequence[MonitoredRun], frame: Frame, first: str) -> list[list[str]]:
    """The numbers of a frame: a row a place, a column a run."""
    columns = [dict(zip(*curve, strict=True)) if curve else {} for curve in frame.curves[: len(runs)]]
    places = sorted({place for column in columns for place in column})
    return [
        [first, *(run.name for run in runs)],
        *([str(place), *(text(column.get(place)) for column in columns)] for place in places),
    ]


def text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def endings(runs: Sequence[MonitoredRun], choices: Menus) -> str:
    """What is shown at first, in words: where every line begins and ends."""
    frame = choices.frames.get(choices.start)
    said = [f"At first {choices.words}."]
    for run, curve in zip(runs, frame.curves if frame else (), strict=False):
        known = [value for value in curve[1] if value is not None] if curve else []
        if known:
            said.append(f"{run.name} goes from {known[0]:.3g} to {known[-1]:.3g}.")
    return " ".join(said)


def stages_of(runs: Sequence[Sequence[MonitorRecord]]) -> tuple[list[str], list[list[MonitorRecord | None]]]:
    """The stages that a slider goes through, and at each of them the record of every run.

    Runs that were measured after the same steps have a stage for each. Runs of other lengths were measured as often,
    and are held against each other by how far they are.
    """
    steps = [[record["step"] for record in records] for records in runs]
    union = sorted({step for each in steps for step in each})
    # A run that ended early, or was measured from its middle on, still has the others' steps.
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
