"""The table and remarks of a sweep, for its page, its summary and the terminal."""

from typing import Any

from spectrim.lab.recipes.names import shown
from spectrim.lab.tables import TextTable, header_and_rows

__all__ = ["NOTE", "TOLERANCE", "remarks", "rows", "sweep_table"]

TOLERANCE = 0.05
"""A learning rate counts as good if its loss is at most this many nats above the best."""

NOTE = (
    f"Good rates: the largest over the smallest learning rate around the best one at which the loss, best over the "
    f"other hyperparameters, stays within {TOLERANCE:g} of the best; at most the width of what was searched. "
    f"A winner is also the luckiest of its trials, so compare winners on other seeds."
)


def rows(summary: dict[str, Any]) -> list[list[str]]:
    """A header, and a row for each recipe."""
    lines = []
    for recipe, entry in summary["recipes"].items():
        done = entry["complete"] + entry["pruned"] + entry["diverged"]
        best = entry["best"] or {"point": {}}
        beside = ", ".join(f"{key} {shown(value)}" for key, value in best["point"].items() if key != "lr")
        lines.append(
            {
                "recipe": recipe,
                "trials done": f"{done} of {entry['budget']}",
                "pruned": str(entry["pruned"]),
                "diverged": str(entry["diverged"]),
                "best loss": f"{best['final_loss']:.4f}" if entry["best"] else "-",
                "best learning rate": f"{best['lr']:.2g}" if entry["best"] else "-",
                "beside it": beside or "-",
                "good rates": f"x{entry['good_rates']:.1f}" if entry["best"] else "-",
            }
        )
    return header_and_rows(lines)


def sweep_table(summary: dict[str, Any]) -> TextTable:
    """The table that ends a sweep."""
    return TextTable(rows(summary), note="\n".join([NOTE, *remarks(summary)]), words=("beside it",))


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
