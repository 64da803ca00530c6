"""The figures of a report page, drawn by plotly from what ``results.json`` holds: bars, rates, and the layout and looks
that all share. Colours of text and grid are the page's, light or dark. Curves of the loss are in
:mod:`spectrim.lab.reports.page.loss_figure`; :mod:`spectrim.lab.reports.pictures` draws the same as files.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from spectrim.lab.reports.page.html import DASHES, Figure, Swatch, Table

__all__ = [
    "colour",
    "cost_figures",
    "dash",
    "layout",
    "number",
    "rate_figure",
    "scatter",
    "shown",
    "stroke",
    "swatches",
    "target_figure",
]

Summary = dict[str, Any]

# Okabe and Ito's palette, which colour-blind readers can tell apart: without its yellow, too faint for a line, and with
# grey for its black, which would vanish on a dark page.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8a8a8a")
DASH_NAMES = ("solid", "dash", "dashdot", "longdash", "longdashdot")
"""Plotly's dashes of recipes, so that their lines differ without colour too; dots are for limits and targets."""

PARTS = {"forward_backward_ms": "forward + backward", "optimizer_ms": "optimizer", "rest_ms": "rest"}
OPACITY = {"forward_backward_ms": 1.0, "optimizer_ms": 0.6, "rest_ms": 0.35}


def swatches(names: Iterable[str]) -> list[Swatch]:
    """Colour and dashes of every recipe, or of every other name that has a line."""
    return [
        Swatch(recipe=name, colour=colour(index), dashes=DASHES[dash(index)], group=str(index))
        for index, name in enumerate(names)
    ]


def colour(index: int) -> str:
    """The colour of the recipe at this place."""
    return COLOURS[index % len(COLOURS)]


def dash(index: int) -> str:
    """The dashes of the recipe at this place, in plotly's word."""
    return DASH_NAMES[index % len(DASH_NAMES)]


def bar_figure(
    title: str, alt: str, bars: Sequence[Summary], axis: str, rows: list[list[str]], note: str = "", **x: Any
) -> Figure:
    """Horizontal bars, a row for each recipe, with room for the text at their ends."""
    longest = max(len(text) for trace in bars for text in trace["text"])
    return Figure(
        title=title,
        alt=alt,
        drawing={
            "data": list(bars),
            "layout": layout(
                x={"title": axis, "rangemode": "tozero", **x},
                bars=True,
                barmode="stack",
                margin={"l": 8, "r": 16 + 8 * longest, "t": 16, "b": 8},
            ),
        },
        numbers=Table(caption=title, rows=rows),
        note=note,
        height=90 + 44 * (len(rows) - 1),
    )


def target_figure(summary: Summary) -> Figure:
    """Tokens after which each recipe reaches AdamW's final loss, as a share of AdamW's."""
    shares = {name: entry["tokens_to_adamw"] for name, entry in summary["recipes"].items()}
    texts = {name: "never" if share is None else f"{share:.0%}" for name, share in shares.items()}
    return bar_figure(
        "Share of AdamW's tokens after which its final loss is reached",
        "Bars of the share of AdamW's tokens after which a recipe reaches AdamW's final loss. "
        + " ".join(f"{name}: {text}." for name, text in texts.items()),
        [bar(index, name, shares[name] or 0, text) for index, (name, text) in enumerate(texts.items())],
        "share of AdamW's tokens",
        [["recipe", "share of AdamW's tokens"], *map(list, texts.items())],
        "Shorter is better. Where the mean curve first is at AdamW's final loss, linear between evaluations.",
        tickformat=".0%",
    )


def cost_figures(summary: Summary) -> list[Figure]:
    """Time of a step in its parts, and the optimizer's memory."""
    recipes = summary["recipes"]
    bars = []
    for index, (name, entry) in enumerate(recipes.items()):
        for key, label in PARTS.items():
            whole = f"{entry['step_ms']:.0f} ms" if key == "rest_ms" else ""
            what = f"{label}: {entry[key]:.1f} ms"
            bars.append(bar(index, name, entry[key], whole, opacity=OPACITY[key], what=what))
    time = bar_figure(
        "Time of a step",
        "Stacked bars of the time of a step. "
        + " ".join(
            f"{name}: {entry['step_ms']:.0f} ms, of which the optimizer {entry['optimizer_ms']:.0f} ms."
            for name, entry in recipes.items()
        ),
        bars,
        "milliseconds per step",
        [
            ["recipe", *(f"{label}, ms" for label in PARTS.values()), "whole step, ms"],
            *([name, *(f"{entry[key]:.1f}" for key in (*PARTS, "step_ms"))] for name, entry in recipes.items()),
        ],
        "From full colour to faint: forward and backward, optimizer, rest; at the end the whole step. Medians over "
        "steps, without evaluations and checkpoints; medians of parts need not add up to that of the whole.",
    )
    megabytes = {name: entry["state_bytes"] / 1e6 for name, entry in recipes.items()}
    memory = bar_figure(
        "Memory of the optimizer",
        "Bars of the memory that the optimizer's state takes. "
        + " ".join(f"{name}: {size:.2f} MB." for name, size in megabytes.items()),
        [bar(index, name, size, f"{size:.2f} MB") for index, (name, size) in enumerate(megabytes.items())],
        "MB of optimizer state",
        [["recipe", "optimizer state, MB"], *([name, f"{size:.2f}"] for name, size in megabytes.items())],
    )
    return [time, memory]


def rate_figure(summary: Summary) -> Figure:
    """The lowest loss at each learning rate of a sweep, and every trial."""
    traces, words, finite = [], [], []
    rows = [["trial", "state", "learning rate", "loss", "point"]]
    for index, (name, entry) in enumerate(summary["recipes"].items()):
        look = {"color": colour(index)}
        curve = entry["curve"]
        traces.append(scatter(index, name, curve["lr"], curve["final_loss"], line=stroke(index)))
        for state, symbol in (("complete", "circle"), ("pruned", "x-thin")):
            trials = [trial for trial in entry["trials"] if trial["state"] == state]
            best = [trial is entry["best"] or trial == entry["best"] for trial in trials]
            marker: Summary = {**look, "symbol": symbol, "size": [14 if it else 8 for it in best]}
            marker["line"] = {"width": 2 if state == "pruned" else 0, **look}
            x, y = [trial["lr"] for trial in trials], [loss_of(trial) for trial in trials]
            text = [shown(f"{name}, trial {trial['number']}, {state}: {point(trial)}") for trial in trials]
            hover = "%{text}<br>loss %{y:.4f}<extra></extra>"
            traces.append(scatter(index, name, x, y, hover=hover, mode="markers", marker=marker, text=text))
        finite += [trial["final_loss"] for trial in entry["trials"] if trial["final_loss"] is not None]
        for trial in entry["trials"]:
            loss = loss_of(trial)
            rows.append(
                [f"{name} {trial['number']}", trial["state"], number(trial["lr"]),
                 "-" if loss is None else f"{loss:.4f}", point(trial)]
            )  # fmt: skip
        if entry["best"]:
            words.append(f"{name}: lowest {entry['best']['final_loss']:.4f} at {entry['best']['lr']:.2g}.")
    close_up = None
    if finite:
        # Losses far above the best are shown in the whole range alone.
        low, high = min(finite), sorted(finite)[int(0.9 * (len(finite) - 1))]
        margin = max(0.05 * (high - low), 0.01)
        close_up = (low - margin, high + 2 * margin)
    return Figure(
        title="Lowest loss at each learning rate",
        alt=f"Lines of the lowest loss at each learning rate, one for each recipe. {' '.join(words)}",
        drawing={
            "data": traces,
            "layout": layout(
                x={"title": "peak learning rate", "type": "log", **rate_ticks(summary)},
                y={"title": "final validation loss (nats per token)"},
                hovermode="closest",
            ),
        },
        numbers=Table(caption="Every trial", rows=rows, words=True),
        note="Dots: trials, the best of each recipe larger. Crosses: pruned, at their last loss.",
        scales=("y",),
        close_up=close_up,
    )


def rate_ticks(summary: Summary) -> dict[str, Any]:
    """Ticks at 1, 2 and 5 times the powers of ten that the learning rates span, written out."""
    known = [trial["lr"] for entry in summary["recipes"].values() for trial in entry["trials"] if trial["lr"]]
    if not known:
        return {}
    powers = range(math.floor(math.log10(min(known))), math.ceil(math.log10(max(known))) + 1)
    ticks = [float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5)]
    return {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def scatter(
    index: int | None, name: str, x: Sequence[Any], y: Sequence[Any], *, hover: str = "", **look: Any
) -> Summary:
    """A trace of lines or dots; ``index`` is the place of its recipe, which decides its colour and its switch."""
    trace = {"type": "scatter", "x": list(x), "y": list(y), "name": shown(name), "mode": "lines", **look}
    trace |= {"hovertemplate": hover} if hover else {"hoverinfo": "skip"}
    return trace if index is None else {**trace, "legendgroup": str(index)}


def stroke(index: int, width: float = 2.25) -> Summary:
    """The line of the recipe at this place."""
    return {"color": colour(index), "dash": dash(index), "width": width}


def bar(index: int, name: str, value: float, text: str, *, opacity: float = 1, what: str = "") -> Summary:
    """A recipe's horizontal bar; one trace each, so that a recipe can be hidden."""
    return {
        **{"type": "bar", "x": [value], "y": [shown(name).replace(":", ":<br>")], "orientation": "h"},
        **{"name": shown(name), "marker": {"color": colour(index), "opacity": opacity}, "legendgroup": str(index)},
        **{"width": 0.6, "text": [text], "textposition": "outside", "cliponaxis": False},
        "hovertemplate": f"{shown(name)}<br>{what or text}<extra></extra>",
    }


def layout(*, x: Summary, y: Summary | None = None, bars: bool = False, **more: Any) -> Summary:
    """The layout that all figures share; the transparent background shows the page's own."""
    axis = {"automargin": True, "ticks": "outside", "ticklen": 6, "tickcolor": "rgba(0,0,0,0)", "zeroline": False}
    vertical = {"autorange": "reversed", "showgrid": False, "type": "category"} if bars else {}
    titles = [{"title": {"text": given["title"], "standoff": 12}} if given else {} for given in (x, y)]
    return {
        **{"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "showlegend": False},
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "margin": {"l": 8, "r": 16, "t": 16, "b": 8},
        "xaxis": {**axis, "showgrid": True, **x, **titles[0]},
        "yaxis": {**axis, "showgrid": True, **vertical, **(y or {}), **titles[1]},
        **more,
    }


def shown(text: str) -> str:
    """Escape a user's text, since plotly reads markup in every text."""
    return escape(text)


def number(value: float) -> str:
    """A count in full, or a measure in three digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def loss_of(trial: Summary) -> float | None:
    loss: float | None = trial["final_loss"] if trial["state"] == "complete" else trial["last_loss"]
    return loss


def point(trial: Summary) -> str:
    return ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in trial["point"].items()
    )
