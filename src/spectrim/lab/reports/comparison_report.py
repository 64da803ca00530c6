"""The tables and notes of a comparison, for its page, its summary and the terminal.

They are made from the dictionary that :func:`spectrim.lab.experiments.comparison.compare` returns, which
``results.json`` holds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spectrim.lab.models.architecture import name_of
from spectrim.lab.recipes.names import BASELINE
from spectrim.lab.reports.words import verdict
from spectrim.lab.tables import TextTable, header_and_rows, value_of

__all__ = [
    "COLUMNS",
    "EQUAL_COLUMNS",
    "EQUAL_NOTE",
    "FREQUENCY_NOTE",
    "NOTE",
    "Column",
    "budget_note",
    "difference",
    "frequency_rows",
    "has_times",
    "heading",
    "table_rows",
    "terminal_tables",
    "uneven_notes",
    "verdict_rows",
]

Summary = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of a table: headings, and the format of a value."""

    heading: str
    short: str
    """Heading in the terminal; empty if the column is left out there."""
    format: Callable[[Any], str]
    absent: str = "-"
    """The text for a missing number."""

    def show(self, value: Any) -> str:
        """The text of a cell."""
        return self.absent if value is None else self.format(value)


COLUMNS = {
    "lr": Column("learning rate", "", "{:.2g}".format),
    "final_loss": Column("final loss", "final loss", "{:.4f}".format, "diverged"),
    "tokens_to_adamw": Column("tokens to AdamW's loss", "tokens to AdamW", "{:.0%}".format, "never"),
    "step_ms": Column("step ms", "step ms", "{:.1f}".format),
    "forward_backward_ms": Column("forward+backward ms", "fwd+bwd ms", "{:.1f}".format),
    "optimizer_ms": Column("optimizer ms", "optim. ms", "{:.1f}".format),
    "optimizer_share": Column("optimizer share", "optim. share", "{:.0%}".format),
    "rest_ms": Column("rest ms", "", "{:.1f}".format),
    "state_bytes": Column("state MB", "state MB", lambda value: f"{value / 1e6:.2f}"),
    "weight_norm": Column("weight norm", "weight norm", "{:.1f}".format),
    "largest_singular_value": Column("largest singular value", "largest σ", "{:.2f}".format),
}


def difference(value: dict[str, Any]) -> str:
    """A paired difference with half of its interval, where there is one."""
    half = "" if value["low"] is None else f" ±{(value['high'] - value['low']) / 2:.4f}"
    return f"{value['mean']:+.4f}{half}"


EQUAL_COLUMNS = {
    "difference_to_adamw": Column("difference to AdamW", "difference to AdamW", difference),
    "seconds": Column("training s", "", "{:.1f}".format),
    "equal_time.share": Column("steps at AdamW's time", "steps then", "{:.0%}".format),
    "equal_time.loss": Column("loss at AdamW's time", "loss then", "{:.4f}".format),
    "equal_time.difference": Column("difference at AdamW's time", "difference then", difference),
    "diverged": Column("diverged", "diverged", str),
    "loss_spikes": Column("loss spikes", "loss spikes", str),
}
"""Columns of the table on equal terms; a dotted key is a nested value."""


def has_times(summary: Summary) -> bool:
    """True if the time of every evaluation is known; results of earlier versions lack it."""
    return all(entry.get("curve_seconds") for entry in summary["recipes"].values())


def terminal_tables(summary: Summary) -> list[TextTable]:
    """The tables that a comparison prints: every recipe, and the same runs on equal terms."""
    losses = {name: loss for name, entry in summary["recipes"].items() if (loss := entry["final_loss"]) is not None}
    best = min(losses, key=losses.__getitem__, default=None)
    tables = [TextTable(table_rows(summary, COLUMNS, short=True), title=heading(summary), note=NOTE, bold=best)]
    if has_times(summary):
        rows = table_rows(summary, EQUAL_COLUMNS, short=True)
        tables.append(TextTable(rows, title="On equal terms", note=EQUAL_NOTE, bold=best))
    return tables


NOTE = (
    "Means over seeds. Times are medians of a step, without evaluation and checkpoints. Tokens to AdamW's loss: share "
    "of AdamW's tokens after which the mean validation loss first reaches AdamW's final one."
)

EQUAL_NOTE = (
    "Differences of losses are to AdamW with the same seed: mean and 95 % interval (Student's t over the seeds; one "
    "seed has none). Time is that of all steps, without evaluation and checkpoints. At AdamW's time: on the run's "
    "curve, when AdamW was done; less than 100% of the steps means that the learning rate had not come down yet. "
    "Diverged and loss spikes: counts over all seeds."
)


def heading(summary: Summary) -> str:
    """A one-line summary of the comparison's settings."""
    config, first = summary["config"], next(iter(summary["recipes"].values()))
    tokens = first["curve"]["tokens"][-1]
    seeds = ", ".join(map(str, config["seeds"]))
    length = f"{config['steps']} steps, {tokens:,} tokens"
    if budget := summary.get("budget"):
        length = f"{budget['seconds']:.1f} s of training"
    return f"Validation loss after {length}; model {name_of(config['model'])}; seeds {seeds}"


def table_rows(summary: Summary, columns: dict[str, Column] = COLUMNS, *, short: bool = False) -> list[list[str]]:
    """A table as text: its header, then a row a recipe; ``short`` leaves out columns for which a terminal has no
    room."""
    known = {key for entry in summary["recipes"].values() for key in entry}  # results of older versions hold fewer
    columns = {
        key: column for key, column in columns.items() if key.partition(".")[0] in known and (column.short or not short)
    }
    header = ["recipe", *(column.short if short else column.heading for column in columns.values())]
    return [
        header,
        *(
            [recipe, *(column.show(value_of(entry, key)) for key, column in columns.items())]
            for recipe, entry in summary["recipes"].items()
        ),
    ]


def verdict_rows(summary: Summary) -> list[list[str]]:
    """A row for each recipe but AdamW, which they are compared with; empty if AdamW has no final loss."""
    recipes = summary["recipes"]
    base = recipes.get(BASELINE, {})
    target = base.get("final_loss")

    def show(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    def times(entry: Summary, key: str) -> str:
        return f"x{entry[key] / base[key]:.2f}" if entry.get(key) and base.get(key) else "-"

    rows = []
    for name, entry in recipes.items():
        if target is not None and name != BASELINE:
            loss, paired = entry["final_loss"], entry.get("difference_to_adamw") or {}
            known = paired.get("low") is not None
            rows.append(
                {
                    "recipe": name,
                    "final loss": show(loss, ".4f"),
                    "difference to AdamW": show(None if loss is None else loss - target, "+.4f"),
                    "95 % interval": f"{paired['low']:+.4f} to {paired['high']:+.4f}" if known else "-",
                    "tokens to AdamW's loss": COLUMNS["tokens_to_adamw"].show(entry["tokens_to_adamw"]),
                    "step time": times(entry, "step_ms"),
                    "optimizer state": times(entry, "state_bytes"),
                    "difference at AdamW's time": show(value_of(entry, "equal_time.difference.mean"), "+.4f"),
                    "verdict": verdict(entry, target),
                }
            )
    return header_and_rows(rows)


def budget_note(summary: Summary) -> str:
    """For a comparison at equal time, the time and the steps of every recipe; else empty."""
    if not (budget := summary.get("budget")):
        return ""
    steps = ", ".join(f"`{recipe}` {count}" for recipe, count in budget["steps"].items())
    return f"Every recipe had {budget['seconds']:.1f} s, by its speed when timed before: steps {steps}."


def uneven_notes(summary: Summary) -> list[str]:
    """Warnings for recipes whose whole time exceeds that of as many median steps."""
    return [
        f"Times of `{name}` are uneven: all steps took {entry['unevenness']:.1f} times what the median step would "
        f"give. The machine was busy with something else, or the optimizer works in bursts."
        for name, entry in summary["recipes"].items()
        if (entry.get("unevenness") or 0) > UNEVEN
    ]


FREQUENCY_NOTE = (
    "Final validation loss by the target's rank of frequency in the training text; every column but for rounding to "
    "whole tokens stands for an equal share of that text."
)


def frequency_rows(summary: Summary) -> list[list[str]]:
    """The table of rare and frequent tokens; empty for results of older versions."""
    by_recipe = {name: entry.get("val_loss_by_frequency") for name, entry in summary["recipes"].items()}
    if not all(by_recipe.values()):
        return []
    ranks = list(next(iter(by_recipe.values())))
    return [
        ["recipe", *(f"ranks {key}" for key in ranks)],
        *(
            [name, *("-" if losses.get(key) is None else f"{losses[key]:.4f}" for key in ranks)]
            for name, losses in by_recipe.items()
        ),
    ]


UNEVEN = 1.25
"""The ratio of a run's time to that of as many median steps above which the report warns."""
