"""The curves of a report page: validation loss against tokens or time, a line a recipe and its seeds as a band."""

from dataclasses import dataclass
from typing import Any, Literal

from spectrim.lab.recipes.names import BASELINE
from spectrim.lab.reports.page.figures import colour, layout, number, scatter, stroke
from spectrim.lab.reports.page.html import Figure, Table

__all__ = ["loss_figure"]

Summary = dict[str, Any]

Over = Literal["tokens", "time"]


@dataclass(frozen=True, kw_only=True)
class Across:
    """A horizontal axis for the loss."""

    name: str
    title: str
    hover: str
    """Plotly's template for the label of a point."""
    format: str
    mode: str
    note: str = ""


ACROSS: dict[Over, Across] = {
    # All recipes are evaluated at the same tokens, so one label can show them all.
    "tokens": Across(name="tokens", title="tokens", hover="%{y:.4f}", format=",d", mode="x unified"),
    "time": Across(
        name="training time",
        title="training time (s)",
        hover="%{y:.4f} after %{x:.1f} s<extra>%{fullData.name}</extra>",
        format=".1f",
        mode="closest",
        note="Time is that of all steps, without evaluations and checkpoints.",
    ),
}

GREY = "#8a8a8a"


def loss_figure(summary: Summary, *, over: Over) -> Figure:
    """The figure of validation loss, close up on the end of training."""
    across, recipes = ACROSS[over], summary["recipes"]
    traces = [trace for index, name in enumerate(recipes) for trace in traces_of(index, name, recipes[name], over)]
    target = recipes.get(BASELINE, {}).get("final_loss")
    if target is not None:
        ends = places(recipes[BASELINE], over)[0], max(places(entry, over)[-1] for entry in recipes.values())
        dotted = {"color": GREY, "width": 1, "dash": "dot"}
        traces.append(scatter(None, "AdamW's final loss", ends, [target, target], line=dotted))
    x = {"title": across.title, "rangemode": "tozero", "hoverformat": across.format}
    y = {"title": "validation loss (nats per token)"}
    return Figure(
        title=f"Validation loss against {across.name}",
        alt=f"Lines of mean validation loss against {across.name}, one for each recipe. {endings(recipes)}",
        drawing={"data": traces, "layout": layout(x=x, y=y, hovermode=across.mode)},
        numbers=numbers(recipes, over),
        note=" ".join(filter(None, [note_on_seeds(recipes), across.note])),
        scales=("y", "x"),
        close_up=loss_range(recipes),
    )


def places(entry: Summary, over: Over) -> list[float]:
    """The places on the horizontal axis of a recipe's evaluations."""
    found: list[float] = entry["curve"]["tokens"] if over == "tokens" else entry["curve_seconds"]
    return found


def traces_of(index: int, name: str, entry: Summary, over: Over) -> list[dict[str, Any]]:
    """The mean of a recipe, over the band of its seeds if there are several."""
    x, traces = places(entry, over), []
    if band := seed_range(entry):
        low, high = band
        fill: Summary = {"fill": "toself", "fillcolor": colour(index), "opacity": 0.2, "line": {"width": 0}}
        traces.append(scatter(index, name, [*x, *reversed(x)], [*low, *reversed(high)], **fill))
    # The baseline is thicker, since others are compared with it.
    line = stroke(index, 3 if name == BASELINE else 2.25)
    return [*traces, scatter(index, name, x, entry["curve"]["val_loss"], hover=ACROSS[over].hover, line=line)]


def numbers(recipes: Summary, over: Over) -> Table:
    """A row for each evaluation; recipes that were evaluated at the same places share the first column."""
    caption = f"Validation loss against {ACROSS[over].name}; lowest and highest seed in brackets"
    x = {name: list(map(number, places(entry, over))) for name, entry in recipes.items()}
    y = {name: losses(entry) for name, entry in recipes.items()}
    first = next(iter(x.values()))
    if all(other == first for other in x.values()):
        columns = [[ACROSS[over].title, *first], *([name, *column] for name, column in y.items())]
    else:
        longest = max(map(len, x.values()))
        columns = [["evaluation", *map(str, range(1, longest + 1))]]
        for name in recipes:
            missing = [""] * (longest - len(x[name]))
            columns += [
                [f"{name}: {ACROSS[over].title}", *x[name], *missing],
                [f"{name}: loss", *y[name], *missing],
            ]
    return Table(caption=caption, rows=list(zip(*columns, strict=True)))


def losses(entry: Summary) -> list[str]:
    """The mean at every evaluation, with the range of the seeds where it is known."""
    means = ["diverged" if loss is None else f"{loss:.4f}" for loss in entry["curve"]["val_loss"]]
    if not (band := seed_range(entry)):
        return means
    return [f"{mean} ({low:.4f} to {high:.4f})" for mean, low, high in zip(means, *band, strict=True)]


def endings(recipes: Summary) -> str:
    """The final loss of every recipe, in words."""
    ends = {name: entry["final_loss"] for name, entry in recipes.items()}
    return " ".join(f"{name} {'diverged' if end is None else f'ends at {end:.4f}'}." for name, end in ends.items())


def note_on_seeds(recipes: Summary) -> str:
    seeds = max(len(entry.get("seeds", {})) for entry in recipes.values())
    return f"Lines: means over {seeds} seeds; bands: from the lowest seed to the highest." if seeds > 1 else ""


def seed_range(entry: dict[str, Any]) -> tuple[list[float], list[float]] | None:
    """The lowest and the highest loss over a recipe's seeds at each evaluation; None with one seed, or where a seed
    diverged.
    """
    curves = [seed["curve"]["val_loss"] for seed in entry.get("seeds", {}).values()]
    columns = list(zip(*curves, strict=True))
    if len(curves) < 2 or any(loss is None for column in columns for loss in column):
        return None
    return [min(column) for column in columns], [max(column) for column in columns]


def loss_range(recipes: dict[str, dict[str, Any]]) -> tuple[float, float] | None:
    """The range of losses after the first fifth of training."""
    curves = [entry["curve"]["val_loss"] for entry in recipes.values()]
    known = [loss for curve in curves for loss in curve if loss is not None]
    early = [curve[len(curve) // 5] for curve in curves if curve[len(curve) // 5] is not None]
    if not early or max(early) <= min(known):
        return None
    margin = 0.05 * (max(early) - min(known))
    return min(known) - margin, max(early) + margin
