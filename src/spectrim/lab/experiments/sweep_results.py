"""The results of a sweep: every trial, the best one of each recipe, and the loss at each learning rate.

They are read from the sweep's folder, also while trials are running. ``spectrim compare --from-sweep`` trains the
winners.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spectrim.lab.config import SharedConfig
from spectrim.lab.errors import LabError
from spectrim.lab.experiments.runs import dimensions_of
from spectrim.lab.experiments.search_space import as_settings
from spectrim.lab.experiments.sweep import Sweep
from spectrim.lab.logging.log import read_log
from spectrim.lab.recipes.names import parse_recipe
from spectrim.lab.reports.page.sweep_page import write_report
from spectrim.lab.reports.sweep_report import TOLERANCE
from spectrim.lab.settings import merge
from spectrim.lab.training.folder import RunFolder

__all__ = ["collect", "settings_of_winners", "winners", "write_sweep_report"]


def collect(sweep: Sweep) -> dict[str, Any]:
    """The content of ``results.json``: trials, winner and loss curve over the learning rate of every recipe."""
    recipes = {recipe: collect_recipe(sweep, recipe) for recipe in sweep.config.recipes}
    trials = (trial for entry in recipes.values() for trial in entry["trials"] if trial["state"] == "complete")
    results = (RunFolder(sweep.out / trial["folder"]).result() for trial in trials)
    environment: dict[str, Any] = next((dict(result.environment) for result in results if result is not None), {})
    return {"recipes": recipes, "config": sweep.config.model_dump(mode="json"), "environment": environment}


def collect_recipe(sweep: Sweep, recipe: str) -> dict[str, Any]:
    trials: list[dict[str, Any]] = []
    for item in sweep.study(recipe).get_trials(deepcopy=False):
        state = "diverged" if item.user_attrs.get("diverged") else STATES[item.state.name]
        if state == "waiting":
            continue
        folder = sweep.folder(recipe, item.number)
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
    result = RunFolder(sweep.out / best["folder"]).result() if best else None
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
        "plan": result.plan.model_dump(mode="json") if result and result.plan else None,
    }


STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "RUNNING": "running", "FAIL": "failed", "WAITING": "waiting"}


def rate_curve(complete: list[dict[str, Any]], *, exact: bool) -> list[tuple[float, float]]:
    """The lowest loss at each learning rate, or within each factor of two, and its rate."""
    best: dict[Any, tuple[float, float]] = {}
    for trial in complete:
        bin_ = f"{trial['lr']:.6g}" if exact else round(math.log2(trial["lr"]))
        point = (trial["lr"], trial["final_loss"])
        best[bin_] = min(best.get(bin_, point), point, key=lambda pair: pair[1])
    return sorted(best.values())


def good_rates(curve: list[tuple[float, float]]) -> float | None:
    """The factor between the largest and the smallest learning rate around the best one whose losses are within
    :data:`TOLERANCE` of the lowest; None without a trial.
    """
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
    """The hyperparameters of a winner at the edge of their range; better values may lie beyond it."""
    dimensions = dimensions_of(sweep.config, recipe)
    return [key for key, value in point.items() if dimensions[key].at_edge(value)]


def settings_of_winners(folder: Path, recipes: Sequence[str] | None = None) -> dict[str, Any]:
    """Settings for a comparison of a sweep's winners: the sweep's own, with the winners' hyperparameters.

    Raises:
        LabError: there is no sweep, or it has no winner for one of the recipes yet.
    """
    sweep = Sweep(folder)
    names = [parse_recipe(name).name for name in recipes or sweep.config.recipes]
    for name in names:
        if name not in sweep.config.recipes:
            raise LabError(
                f"recipe {name!r} is not in sweep {str(folder)!r}, expected {', '.join(sweep.config.recipes)}"
            )
    settings = sweep.config.model_dump(mode="json")
    # The comparison has its own monitor settings.
    shared = {key: settings[key] for key in SharedConfig.model_fields if key != "monitor"}
    return {**shared, "recipes": names, "overrides": winners(sweep, names)}


def winners(sweep: Sweep, recipes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The winning values of the table ``optimizer`` for each recipe, fixed ones included.

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
    """Write results.json, summary.md and the picture into the sweep's folder; returns the content of results.json."""
    summary = collect(sweep)
    write_report(summary, sweep.out)
    return summary
