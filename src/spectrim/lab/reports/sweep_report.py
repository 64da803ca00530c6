"""The report of a sweep, drawn from its results: the winners, and how the loss depends on the learning rate."""

from pathlib import Path
from typing import Any

from spectrim.lab.files import write_json, write_text
from spectrim.lab.models.architecture import name_of
from spectrim.lab.recipes.names import BASELINE, shown
from spectrim.lab.reports.plots import look, save_figure
from spectrim.lab.tables import TextTable, markdown_table

__all__ = ["HEADINGS", "NOTE", "TOLERANCE", "remarks", "rows", "sweep_table", "write_summary"]

TOLERANCE = 0.05
"""Nats above a recipe's best loss within which a learning rate still counts as good."""

HEADINGS = ("recipe", "trials done", "pruned", "diverged", "best loss", "best learning rate", "beside it", "good rates")

NOTE = (
    f"Good rates: the largest over the smallest learning rate around the best one at which the loss, best over the "
    f"other hyperparameters, stays within {TOLERANCE:g} of the best; at most the width of what was searched. "
    f"A winner is also the luckiest of its trials, so compare winners on other seeds."
)


def write_summary(summary: dict[str, Any], out: Path) -> None:
    """Write results.json, summary.md and the picture into the sweep's folder."""
    for suffix in ("png", "svg"):
        save_figure(out / f"learning_rates.{suffix}", lambda axes: draw(axes, summary))
    write_text(out / "summary.md", markdown(summary, out.name))
    write_json(out / "results.json", summary)


def rows(summary: dict[str, Any]) -> list[list[str]]:
    """A row of cells for each recipe."""
    table = []
    for recipe, entry in summary["recipes"].items():
        done = entry["complete"] + entry["pruned"] + entry["diverged"]
        cells = [recipe, f"{done} of {entry['budget']}", str(entry["pruned"]), str(entry["diverged"])]
        if entry["best"] is None:
            table.append([*cells, "-", "-", "-", "-"])
            continue
        point = {key: value for key, value in entry["best"]["point"].items() if key != "lr"}
        beside = ", ".join(f"{key} {shown(value)}" for key, value in point.items()) or "-"
        best = [f"{entry['best']['final_loss']:.4f}", f"{entry['best']['lr']:.2g}"]
        table.append([*cells, *best, beside, f"x{entry['good_rates']:.1f}"])
    return table


def sweep_table(summary: dict[str, Any]) -> TextTable:
    """The table that ends a sweep."""
    return TextTable([HEADINGS, *rows(summary)], note="\n".join([NOTE, *remarks(summary)]), words=("beside it",))


def remarks(summary: dict[str, Any]) -> list[str]:
    """What a careful reader is told of this sweep: winners at an edge, and budgets that differ."""
    lines = []
    for recipe, entry in summary["recipes"].items():
        if entry["at_edge"]:
            keys = " and ".join(entry["at_edge"])
            lines.append(f"{recipe}: the winner's {keys} lies at the edge of its range; the best may lie beyond.")
    if len({entry["budget"] for entry in summary["recipes"].values()}) > 1:
        budgets = ", ".join(f"{recipe} {entry['budget']}" for recipe, entry in summary["recipes"].items())
        lines.append(f"The budgets are NOT equal: trials {budgets}.")
    return lines


def markdown(summary: dict[str, Any], name: str) -> str:
    """The summary as a Markdown page beside its picture."""
    config = summary["config"]
    tokens = config["steps"] * config["data"]["batch_size"] * config["data"]["sequence_length"]
    used = ", ".join(f"`{recipe}` {entry['tokens']:,}" for recipe, entry in summary["recipes"].items())
    search = f"optuna, pruner {config['pruner']}" if config["method"] == "optuna" else "grid"
    lines = [
        f"# Sweep {name}",
        "",
        f"Validation loss after {config['steps']} steps, {tokens:,} tokens; model {name_of(config['model'])}; "
        f"seed {config['seed']}; search: {search}.",
        "",
        *markdown_table([HEADINGS, *rows(summary)]),
        "",
        NOTE,
        "",
        f"Tokens used, those of pruned trials included: {used}.",
        "",
        *(f"- {line}" for line in remarks(summary)),
        "",
        "![Loss against learning rate, by recipe](learning_rates.svg)",
        "",
        "## What was searched",
        "",
    ]
    for recipe in config["recipes"]:
        ranges = ", ".join(f"{key} {text}" for key, text in config["space"][recipe].items())
        lines.append(f"- `{recipe}`: {ranges}")
    lines += ["", "Every setting: `config.toml`; every trial: `results.json` and its own folder in `trials/`.", ""]
    lines += [f"- {key}: {value}" for key, value in summary["environment"].items()]
    return "\n".join(lines) + "\n"


def draw(axes: Any, summary: dict[str, Any]) -> None:
    """Loss against learning rate: a line of the best at each rate, and every trial as a dot."""
    from matplotlib.ticker import LogLocator, NullFormatter

    finite = []
    for index, (recipe, entry) in enumerate(summary["recipes"].items()):
        style = look(index)
        complete = [trial for trial in entry["trials"] if trial["state"] == "complete"]
        pruned = [trial for trial in entry["trials"] if trial["state"] == "pruned"]
        front = 3 if recipe == BASELINE else 2
        axes.plot(entry["curve"]["lr"], entry["curve"]["final_loss"], label=recipe, linewidth=2, zorder=front, **style)
        losses = [trial["final_loss"] for trial in complete]
        finite += losses
        axes.scatter([trial["lr"] for trial in complete], losses, s=14, color=style["color"], alpha=0.6, linewidths=0)
        axes.scatter(
            [trial["lr"] for trial in pruned if trial["last_loss"] is not None],
            [trial["last_loss"] for trial in pruned if trial["last_loss"] is not None],
            **{"s": 18, "marker": "x", "color": style["color"], "alpha": 0.6, "linewidths": 1},
        )
        if entry["best"]:
            place = (entry["best"]["lr"], entry["best"]["final_loss"])
            axes.scatter(*place, s=60, facecolors="none", edgecolors=style["color"], zorder=4)
    axes.set_xscale("log")
    if not any(entry["complete"] or entry["pruned"] for entry in summary["recipes"].values()):
        # A logarithmic axis has no place for nothing.
        axes.set_xlim(1e-5, 1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    if finite:
        # Losses far above the best would press the rest together; they go out of the picture at the top.
        low, high = min(finite), sorted(finite)[int(0.9 * (len(finite) - 1))]
        margin = max(0.05 * (high - low), 0.01)
        axes.set_ylim(low - margin, high + 2 * margin)
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("final validation loss (nats per token)")
    axes.set_title("Lowest loss at each learning rate; dots: trials; crosses: pruned, at their last loss", loc="left")
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    if summary["recipes"]:
        axes.legend(frameon=False, title="recipe", alignment="left")
