"""Saves the figures of a report page as PNG and SVG: matplotlib draws the same description as plotly.

A :class:`spectrim.lab.reports.page.html.Figure` is drawn as it is shown at first, as rows of dots beside each other, or
as a grid with a panel for every matrix that its first menu offers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from html import unescape
from math import isfinite
from pathlib import Path
from textwrap import wrap
from typing import Any

from spectrim.lab.files import write_atomically
from spectrim.lab.reports.page.html import Figure

__all__ = ["Trace", "choice_panels", "save_figure", "save_grid", "save_rows"]

Trace = Mapping[str, Any]
"""A trace of plotly: lines, dots or bands."""

DASHES: dict[str, Any] = {
    **{"solid": "-", "dash": "--", "dashdot": "-.", "dot": ":"},
    **{"longdash": (0, (9, 2)), "longdashdot": (0, (9, 2, 1, 2))},
}
MARKERS = {"circle": "o", "square-open": "s", "diamond-open": "D", "x-thin": "x", "line-ns": "|"}
INK = "#333333"

MOST_ROWS, MOST_COLUMNS = 14, 4
"""The largest grid; other matrices are on the page and in the numbers alone."""


def save_figure(figure: Figure, folder: Path, stem: str, *, labels: Mapping[str, str] | None = None) -> None:
    """Draw a figure as the page shows it at first.

    Args:
        figure: to draw.
        folder: for ``stem.png`` and ``stem.svg``.
        stem: of the files' names.
        labels: of the legend, by names of traces and in its order; other traces have no entry.
    """

    def fill(picture: Any) -> None:
        axes = picture.add_subplot()
        handles: dict[str, Any] = {}
        for trace in figure.drawing["data"]:
            drawn = draw(axes, trace)
            if drawn is not None:
                handles.setdefault(unescape(trace.get("name", "")), drawn)
        set_axes(axes, figure.drawing["layout"])
        if figure.close_up:
            axes.set_ylim(*figure.close_up)
        axes.set_title(figure.title, loc="left")
        shown = {name: label for name, label in (labels or {name: name for name in handles}).items() if name in handles}
        if shown:
            axes.legend([handles[name] for name in shown], shown.values(), frameon=False, fontsize=9)

    write(folder, stem, fill, (8, 5))


def save_rows(
    figures: Iterable[Figure | None], folder: Path, stem: str, *, title: str, group: str | None = None
) -> None:
    """Draw figures of dots beside each other, a row for every matrix; None stands for no figure.

    ``group`` is the trace group of one subject; without it all are drawn.
    """
    drawn = [figure for figure in figures if figure]
    chosen = [
        [trace for trace in figure.drawing["data"] if group is None or trace.get("legendgroup", group) == group]
        for figure in drawn
    ]
    names = list(dict.fromkeys(name for traces in chosen for trace in traces for name in trace["y"]))

    def fill(picture: Any) -> None:
        panels = picture.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
        for axes, figure, traces in zip(panels, drawn, chosen, strict=True):
            for trace in traces:
                rows = [names.index(name) for name in trace["y"]]
                label = unescape(trace["name"])
                draw(axes, {**trace, "y": rows}, label=label if group is None else label.rpartition(": ")[2])
            set_axes(axes, {"xaxis": figure.drawing["layout"]["xaxis"]})
            axes.set_xlabel("\n".join(wrap(figure.title, 40)), fontsize=9)
            if len(traces) > 1:
                axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        panels[0].set_yticks(range(len(names)), labels=names, fontsize=8)
        panels[0].set_ylim(len(names) - 0.4, -0.6)
        picture.suptitle(title, x=0.01, ha="left", fontsize=11)

    if names:
        write(folder, stem, fill, (4.2 * len(drawn), 2.2 + 0.24 * len(names)))


Panels = Mapping[str, Sequence[Trace]]
"""Traces by the matrix's name in a menu, such as "layer 1 · mlp.up_proj"."""


Overlay = tuple[tuple[int, ...], int, Trace]
"""A curve of every panel: the options of the further menus, its place in their frame, and its name and look."""


def choice_panels(figure: Figure, overlays: Sequence[Overlay]) -> Panels:
    """The curves of a figure with menus as panels, one for every option of its first menu."""
    panels: dict[str, list[Trace]] = {}
    if figure.choices is None:
        return panels
    for place, option in enumerate(figure.choices.controls[0].options):
        for rest, index, look in overlays:
            frame = figure.choices.frames.get((place, *rest))
            if frame is not None and (curve := frame.curves[index]) is not None:
                panels.setdefault(option, []).append({**look, "x": curve[0], "y": curve[1]})
    return panels


def save_grid(panels: Panels, folder: Path, stem: str, *, title: str, x: Trace, y: Trace) -> None:
    """Draw a panel for every matrix, one row for a kind of matrix and one column for a layer; nothing without panels.

    Args:
        panels: the traces; those with one name share a look and a legend entry.
        folder: for ``stem.png`` and ``stem.svg``.
        stem: of the files' names.
        title: above all of them.
        x: the horizontal axis, as plotly has it; only its title, type, ticks and direction are used.
        y: the vertical axis.
    """
    places = {option: option.rpartition(" · ") for option in panels}
    kinds = list(dict.fromkeys(kind for *_, kind in places.values()))[:MOST_ROWS]
    layers = list(dict.fromkeys(layer for layer, *_ in places.values()))[:MOST_COLUMNS]

    def fill(picture: Any) -> None:
        grid = picture.subplots(len(kinds), len(layers), sharex=True, sharey=True, squeeze=False)
        handles: dict[str, Any] = {}
        for axes in grid.flat:
            axes.axis("off")
        for option, (layer, _, kind) in places.items():
            if kind not in kinds or layer not in layers:
                continue
            axes = grid[kinds.index(kind)][layers.index(layer)]
            axes.axis("on")
            for trace in panels[option]:
                handles.setdefault(trace["name"], draw(axes, trace))
            set_axes(axes, {"xaxis": {**x, "title": {}}, "yaxis": {**y, "title": {}}})
            axes.tick_params(labelsize=8)
            if axes is grid[kinds.index(kind)][0]:
                axes.set_ylabel(kind.replace(".", ".\n", 1), fontsize=8.5, color=INK)
            if kind == kinds[0]:
                axes.set_title(layer, fontsize=10, color=INK)
        picture.supxlabel(x["title"]["text"], fontsize=9.5, color=INK)
        picture.supylabel(y["title"]["text"], fontsize=9.5, color=INK)
        # One legend whose title is the picture's, so that the two cannot lie over each other.
        picture.legend(
            handles.values(), handles.keys(), title=title, title_fontsize=11, alignment="left", frameon=False,
            loc="outside upper left", ncols=min(len(handles), len(layers) + 1, 4), fontsize=9,
        )  # fmt: skip

    if panels:
        write(folder, stem, fill, (max(6.0, 0.7 + 2.35 * len(layers)), 1.5 + 1.35 * len(kinds)))


def draw(axes: Any, trace: Trace, *, label: str = "") -> Any:
    """Draw a trace; returns its handle for the legend, or None for a band."""
    x, y = list(trace["x"]), [float("nan") if value is None else value for value in trace["y"]]
    if trace.get("fill") == "toself":
        axes.fill(x, y, color=trace["fillcolor"], alpha=trace["opacity"], linewidth=0)
        return None
    mode, line, marker = trace.get("mode", "lines"), trace.get("line", {}), trace.get("marker", {})
    symbol = marker.get("symbol", "circle")
    size = marker.get("size", 6)
    look: dict[str, Any] = {"color": line.get("color") or marker.get("color"), "label": label or None}
    if mode == "markers" and not isinstance(size, int):
        del look["label"]
        return axes.scatter(x, y, s=[4 * each for each in size], marker=MARKERS[symbol], linewidths=1, **look)
    look["linestyle"] = DASHES[line.get("dash", "solid")] if "lines" in mode else ""
    if "markers" in mode:
        look |= {"marker": MARKERS[symbol], "markersize": 0.6 * size}
        look["fillstyle"] = "none" if symbol.endswith("open") else "full"
    return axes.plot(x, y, linewidth=max(1, 0.75 * line.get("width", 2)), **look)[0]


def set_axes(axes: Any, layout: Mapping[str, Any]) -> None:
    """Give both axes the scale, ticks, range and title of plotly's."""
    from matplotlib.ticker import EngFormatter, NullFormatter, PercentFormatter

    for name in ("x", "y"):
        axis, given = getattr(axes, f"{name}axis"), layout.get(f"{name}axis", {})
        # An axis without data cannot be logarithmic.
        log = given.get("type") == "log" and all(map(isfinite, getattr(axes.dataLim, f"interval{name}")))
        if log:
            getattr(axes, f"set_{name}scale")("log")
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(NullFormatter())
        elif given.get("tickformat") == ".0%":
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
        elif max(map(abs, getattr(axes, f"get_{name}lim")())) > 1e4:
            axis.set_major_formatter(EngFormatter(sep=""))
        set_limits = getattr(axes, f"set_{name}lim")
        if given.get("range"):
            set_limits(*(10**end if log else end for end in given["range"]))
        elif given.get("rangemode") == "tozero" and not log:
            set_limits(**{"left" if name == "x" else "bottom": 0})
        if given.get("tickvals"):
            low, high = sorted(getattr(axes, f"get_{name}lim")())
            ticks = [
                (at, text) for at, text in zip(given["tickvals"], given["ticktext"], strict=True) if low <= at <= high
            ]
            if ticks:
                axis.set_ticks([at for at, _ in ticks], labels=[text for _, text in ticks])
        if given.get("autorange") == "reversed":
            axis.set_inverted(True)
        getattr(axes, f"set_{name}label")(given.get("title", {}).get("text", ""))
    axes.grid(color="0.92", linewidth=0.7)
    axes.set_axisbelow(True)


def write(folder: Path, stem: str, fill: Callable[[Any], None], size: tuple[float, float]) -> None:
    """Let ``fill`` fill a figure of this size in inches, and write it as PNG and as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Picture

    # Without pyplot there is no display and no global state. The salt makes files of equal results equal.
    with mpl.rc_context(
        {"svg.hashsalt": "spectrim", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    ):
        picture = Picture(figsize=size, layout="constrained")
        fill(picture)
        for suffix, metadata in (("png", {}), ("svg", {"Date": None})):
            path = folder / f"{stem}.{suffix}"
            write_atomically(path, partial(picture.savefig, format=suffix, dpi=160, metadata=metadata))
            # Keep the layout of the first drawing.
            picture.set_layout_engine("none")
