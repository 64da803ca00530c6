"""The report of a sweep, drawn from its results: the winners, and how the loss depends on the learning rate."""

from pathlib import Path
from typing import Any

from spectrim.lab.files import write_json, write_text
from spectrim.lab.models.architecture import name_of
from spectrim.lab.recipes.names import shown
from spectrim.lab.reports.page.figures import rate_figure
from spectrim.lab.reports.pictures import save_figure
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
    save_figure(rate_figure(summary), out, "learning_rates")
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
    """Warnings about winners at the edge of their range and about unequal budgets."""
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
