"""The pictures of a comparison: validation loss against tokens or time, one line a recipe, its seeds as a band."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from spectrim.lab.files import write_atomically
from spectrim.lab.models.architecture import name_of
from spectrim.lab.recipes.names import BASELINE

__all__ = [
    "COLOURS",
    "STYLES",
    "Over",
    "look",
    "loss_range",
    "save_curves",
    "save_figure",
    "seed_range",
    "write_figure",
]

# Okabe and Ito's palette without its yellow, which is too faint for a line: told apart by colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
"""Beyond the colours there are, and in print, lines differ by their dashes."""


Over = Literal["tokens", "time"]


def save_curves(summary: dict[str, Any], path: Path, *, over: Over = "tokens") -> None:
    """Draw the mean curve of each recipe with the range of its seeds; the suffix of ``path`` chooses PNG or SVG."""
    config = summary["config"]
    title = f"Validation loss, model {name_of(config['model'])}, {len(config['seeds'])} seed(s)"

    def draw_all(axes: Any) -> None:
        draw(axes, summary["recipes"], over)
        axes.set_title(title, loc="left")

    save_figure(path, draw_all)


def save_figure(path: Path, draw_on: Callable[[Any], None]) -> None:
    """Let ``draw_on`` fill the axes of a figure, and write it; the suffix of ``path`` chooses PNG or SVG."""
    write_figure([path], lambda figure: draw_on(figure.add_subplot()))


def write_figure(paths: Sequence[Path], fill: Callable[[Any], None], *, size: tuple[float, float] = (8, 5)) -> None:
    """Let ``fill`` fill a figure of this size in inches, and write it under every path, whose suffix is PNG or SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # Figure without pyplot: no display, no global state. The salt makes equal results equal files.
    with mpl.rc_context(
        {"svg.hashsalt": "spectrim", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=size, layout="constrained")
        fill(figure)
        for path in paths:
            suffix = path.suffix.removeprefix(".")
            metadata = {"Date": None} if suffix == "svg" else {}
            write_atomically(path, partial(figure.savefig, format=suffix, dpi=160, metadata=metadata))
            # What the first drawing laid out holds for the next.
            figure.set_layout_engine("none")


def look(index: int) -> dict[str, Any]:
    """Colour and dashes of the recipe at this place."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": STYLES[index // len(COLOURS) % len(STYLES)]}


def draw(axes: Any, recipes: dict[str, dict[str, Any]], over: Over) -> None:
    # The legend goes from the lowest final loss up, as the lines end.
    order = sorted(recipes, key=lambda name: (recipes[name]["final_loss"] is None, recipes[name]["final_loss"] or 0))
    for name in order:
        index = list(recipes).index(name)
        entry = recipes[name]
        curve = entry["curve"]
        places = [tokens / 1e6 for tokens in curve["tokens"]] if over == "tokens" else entry["curve_seconds"]
        losses = [float("nan") if loss is None else loss for loss in entry["curve"]["val_loss"]]
        final = "diverged" if entry["final_loss"] is None else f"{entry['final_loss']:.3f}"
        style = look(index)
        # The baseline is drawn above the others: everything is read against it.
        axes.plot(places, losses, label=f"{name}  {final}", linewidth=2, zorder=3 if name == BASELINE else 2, **style)
        if band := seed_range(entry):
            axes.fill_between(places, *band, color=style["color"], alpha=0.18, linewidth=0)
    target = recipes.get(BASELINE, {}).get("final_loss")
    if target is not None:
        axes.axhline(target, color="0.5", linewidth=0.8, linestyle=":", zorder=1)
        axes.annotate(
            "AdamW's final loss", (0, target), xytext=(4, -11), textcoords="offset points", color="0.4", fontsize=8
        )
    axes.set_ylim(*loss_range(recipes))
    axes.set_xlim(left=0)
    axes.set_xlabel(
        "tokens (millions)" if over == "tokens" else "training time (s), without evaluation and checkpoints"
    )
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, title="recipe, final loss", alignment="left")


def seed_range(entry: dict[str, Any]) -> tuple[list[float], list[float]] | None:
    """The lowest and the highest loss over a recipe's seeds at each evaluation; None with one seed, or where a seed
    diverged.
    """
    curves = [seed["curve"]["val_loss"] for seed in entry.get("seeds", {}).values()]
    columns = list(zip(*curves, strict=True))
    if len(curves) < 2 or any(loss is None for column in columns for loss in column):
        return None
    return [min(column) for column in columns], [max(column) for column in columns]


def loss_range(recipes: dict[str, dict[str, Any]]) -> tuple[float | None, float | None]:
    """From below the lowest loss to where the curves are after a fifth of training, without the fall from chance."""
    curves = [entry["curve"]["val_loss"] for entry in recipes.values()]
    known = [loss for curve in curves for loss in curve if loss is not None]
    early = [curve[len(curve) // 5] for curve in curves if curve[len(curve) // 5] is not None]
    if not known or not early or max(early) <= min(known):
        return None, None
    margin = 0.05 * (max(early) - min(known))
    return min(known) - margin, max(early) + margin
