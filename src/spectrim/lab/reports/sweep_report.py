"""The table and remarks of a sweep, for its page, its summary and the terminal."""

from typing import Any

from spectrim.lab.recipes.names import shown
from spectrim.lab.tables import TextTable

__all__ = ["HEADINGS", "NOTE", "TOLERANCE", "remarks", "rows", "sweep_table"]

TOLERANCE = 0.05
"""A learning rate counts as good if its loss is at most this many nats above the best."""

HEADINGS = ("recipe", "trials done", "pruned", "diverged", "best loss", "best learning rate", "beside it", "good rates")

NOTE = (
    f"Good rates: the largest over the smallest learning rate around the best one at which the loss, best over the "
    f"other hyperparameters, stays within {TOLERANCE:g} of the best; at most the width of what was searched. "
    f"A winner is also the luckiest of its trials, so compare winners on other seeds."
)


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
