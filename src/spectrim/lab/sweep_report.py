"""The report of a sweep: every trial, each recipe's winner, and how much its loss depends on the learning rate.

Made from the sweep's folder alone, at any time, also while trials are running. ``spectrim compare --from-sweep`` takes
the winners from here.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectrim.lab.architecture import name_of
from spectrim.lab.config import SharedConfig, merge
from spectrim.lab.errors import LabError
from spectrim.lab.files import write_json, write_text
from spectrim.lab.log import read_log
from spectrim.lab.plot import look, save_figure
from spectrim.lab.recipes import parse_recipe
from spectrim.lab.results import BASELINE
from spectrim.lab.search_space import as_settings
from spectrim.lab.sweep import Sweep, shown

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["HEADINGS", "NOTE", "remarks", "rows", "settings_of_winners", "sweep_table", "winners", "write_sweep_report"]

TOLERANCE = 0.05
"""Nats above a recipe's best loss within which a learning rate still counts as good."""

HEADINGS = ("recipe", "trials done", "pruned", "diverged", "best loss", "best learning rate", "beside it", "good rates")

NOTE = (
    f"Good rates: the largest over the smallest learning rate around the best one at which the loss, best over the "
    f"other hyperparameters, stays within {TOLERANCE:g} of the best; at most the width of what was searched. "
    f"A winner is also the luckiest of its trials, so compare winners on other seeds."
)


def collect(sweep: Sweep) -> dict[str, Any]:
    """What ``results.json`` holds: for each recipe its trials, its winner, and its curve over the learning rate."""
    recipes = {recipe: collect_recipe(sweep, recipe) for recipe in sweep.config.recipes}
    environment: dict[str, Any] = next((entry["environment"] for entry in recipes.values() if entry["environment"]), {})
    for entry in recipes.values():
        del entry["environment"]
    return {"recipes": recipes, "config": sweep.config.model_dump(mode="json"), "environment": environment}


def collect_recipe(sweep: Sweep, recipe: str) -> dict[str, Any]:
    trials: list[dict[str, Any]] = []
    environment: dict[str, Any] | None = None
    for item in sweep.study(recipe).get_trials(deepcopy=False):
        state = "diverged" if item.user_attrs.get("diverged") else STATES[item.state.name]
        if state == "waiting":
            continue
        folder = sweep.folder(recipe, item.number)
        result = folder.result() if state == "complete" else None
        environment = environment or (dict(result.environment) if result else None)
        steps = len(read_log(folder.log_file)) if folder.log_file.is_file() else 0
        last = item.intermediate_values[max(item.intermediate_values)] if item.intermediate_values else None
        trials.append(
            {
                "number": item.number,
                "state": state,
                "point": dict(item.params),
                "lr": stored.optimizer.lr if (stored := folder.stored_config()) else None,
                "final_loss": item.value if state == "complete" else None,
                "last_loss": last,
                "steps": steps,
                "folder": folder.path.relative_to(sweep.out).as_posix(),
            }
        )
    complete = [trial for trial in trials if trial["state"] == "complete"]
    best = min(complete, key=lambda trial: trial["final_loss"]) if complete else None
    curve = rate_curve(complete, exact=sweep.config.method == "grid")
    tokens_per_step = sweep.config.data.batch_size * sweep.config.data.sequence_length
    return {
        "budget": sweep.budget(recipe),
        **{state: sum(trial["state"] == state for trial in trials) for state in dict.fromkeys(STATES.values())},
        "diverged": sum(trial["state"] == "diverged" for trial in trials),
        "tokens": tokens_per_step * sum(trial["steps"] for trial in trials),
        "best": best,
        "at_edge": edges(sweep, recipe, best["point"]) if best else [],
        "curve": {"lr": [lr for lr, _ in curve], "final_loss": [loss for _, loss in curve]},
        "good_rates": good_rates(curve),
        "trials": trials,
        "environment": environment,
    }


STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "RUNNING": "running", "FAIL": "failed", "WAITING": "waiting"}


def rate_curve(complete: list[dict[str, Any]], *, exact: bool) -> list[tuple[float, float]]:
    """The lowest loss at each learning rate, or in each factor of two of them, with the rate it was found at."""
    best: dict[Any, tuple[float, float]] = {}
    for trial in complete:
        bin_ = f"{trial['lr']:.6g}" if exact else round(math.log2(trial["lr"]))
        point = (trial["lr"], trial["final_loss"])
        best[bin_] = min(best.get(bin_, point), point, key=lambda pair: pair[1])
    return sorted(best.values())


def good_rates(curve: list[tuple[float, float]]) -> float | None:
    """See :data:`NOTE`."""
    if not curve:
        return None
    losses = [loss for _, loss in curve]
    low = high = losses.index(min(losses))
    while low > 0 and losses[low - 1] <= min(losses) + TOLERANCE:
        low -= 1
    while high + 1 < len(losses) and losses[high + 1] <= min(losses) + TOLERANCE:
        high += 1
    return curve[high][0] / curve[low][0]


def edges(sweep: Sweep, recipe: str, point: dict[str, Any]) -> list[str]:
    """The hyperparameters of a winner that lie at the edge of what was searched: the best may lie beyond."""
    dimensions = sweep.config.dimensions(recipe)
    return [key for key, value in point.items() if dimensions[key].at_edge(value)]


def settings_of_winners(folder: Path, recipes: Sequence[str] | None = None) -> dict[str, Any]:
    """What a comparison of a sweep's winners is configured with: the sweep's own settings, and theirs.

    Raises:
        LabError: there is no sweep, it lacks one of the recipes, or has not found its winner yet.
    """
    sweep = Sweep(folder)
    names = [parse_recipe(name).name for name in recipes or sweep.config.recipes]
    for name in names:
        if name not in sweep.config.recipes:
            raise LabError(
                f"recipe {name!r} is not in sweep {str(folder)!r}, expected {', '.join(sweep.config.recipes)}"
            )
    settings = sweep.config.model_dump(mode="json")
    # Whether trials were monitored says nothing about the comparison.
    shared = {key: settings[key] for key in SharedConfig.model_fields if key != "monitor"}
    return {**shared, "recipes": names, "overrides": winners(sweep, names)}


def winners(sweep: Sweep, recipes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For each of these recipes the values of the table ``optimizer`` that won, fixed ones included.

    Raises:
        LabError: a recipe has no finished trial, or trials that are not done yet.
    """
    found = {}
    for recipe in recipes:
        entry = collect_recipe(sweep, recipe)
        if entry["best"] is None or sweep.remaining(recipe):
            left = sweep.remaining(recipe)
            problem = f"{left} trials of {recipe!r} are not done" if left else f"no trial of {recipe!r} reached its end"
            raise LabError(f"sweep {str(sweep.out)!r}: {problem}")
        found[recipe] = merge(sweep.config.overrides.get(recipe, {}), as_settings(entry["best"]["point"]))
    return found


def write_sweep_report(sweep: Sweep) -> dict[str, Any]:
    """Write results.json, summary.md and the picture into the sweep's folder; returns what results.json holds."""
    summary = collect(sweep)
    for suffix in ("png", "svg"):
        save_figure(sweep.out / f"learning_rates.{suffix}", lambda axes: draw(axes, summary))
    write_text(sweep.out / "summary.md", markdown(summary, sweep))
    write_json(sweep.out / "results.json", summary)
    return summary


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


def sweep_table(summary: dict[str, Any]) -> "Table":
    """The table that ends a sweep."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=0, caption="\n".join([NOTE, *remarks(summary)]), caption_justify="left")
    for index, heading in enumerate(HEADINGS):
        table.add_column("\n".join(heading.split()), justify="left" if index in (0, 6) else "right", vertical="bottom")
    for row in rows(summary):
        table.add_row(*row)
    return table


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


def markdown(summary: dict[str, Any], sweep: Sweep) -> str:
    """The summary as a Markdown page beside its picture."""
    config = sweep.config
    tokens = config.steps * config.data.batch_size * config.data.sequence_length
    used = ", ".join(f"`{recipe}` {entry['tokens']:,}" for recipe, entry in summary["recipes"].items())
    search = f"optuna, pruner {config.pruner}" if config.method == "optuna" else "grid"
    lines = [
        f"# Sweep {sweep.out.name}",
        "",
        f"Validation loss after {config.steps} steps, {tokens:,} tokens; model {name_of(config.model.model_dump())}; "
        f"seed {config.seed}; search: {search}.",
        "",
        f"| {' | '.join(HEADINGS)} |",
        f"|---|{'---:|' * (len(HEADINGS) - 1)}",
        *(f"| `{row[0]}` | {' | '.join(row[1:])} |" for row in rows(summary)),
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
    for recipe in config.recipes:
        ranges = ", ".join(f"{key} {text}" for key, text in config.space[recipe].items())
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
