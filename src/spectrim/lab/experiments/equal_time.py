"""Step budgets for a comparison at equal time: as many steps for each recipe as fit into the same seconds.

Each recipe is timed in a short run of its own. The budgets are stored beside the runs, so that a resumed comparison has
the same steps. The schedule of every recipe spans its own number of steps, so that none is cut off.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from spectrim.lab.config import MonitorConfig, TrainConfig
from spectrim.lab.errors import LabError
from spectrim.lab.files import write_json
from spectrim.lab.logging.dynamics import step_seconds
from spectrim.lab.logging.log import read_log
from spectrim.lab.recipes.names import BASELINE, parse_recipe
from spectrim.lab.settings import Config, PositiveFloat, PositiveInt
from spectrim.lab.training.folder import RunFolder
from spectrim.lab.training.run import train
from spectrim.lab.training.run_statistics import WARMING_UP

__all__ = ["CALIBRATION_STEPS", "Budget", "fit_steps"]

CALIBRATION_STEPS = 33
"""Timed steps, after the first few: a multiple of the periods of methods that work every 5 or 10 steps."""


class Budget(Config):
    """The training time of every recipe, and the steps that fit into it."""

    seconds: PositiveFloat
    step_seconds: dict[str, PositiveFloat]
    """Mean time of a step by recipe, without evaluation and checkpoints."""
    steps: dict[str, PositiveInt]


def fit_steps(
    runs: Sequence[TrainConfig],
    out: Path,
    *,
    seconds: float | None,
    cache_dir: Path | None = None,
    on_calibration: Callable[[TrainConfig], None] | None = None,
    compiled: bool = False,
) -> Budget:
    """The budget of every recipe; stored ones are kept, and the other recipes are timed now.

    Args:
        runs: one run of each recipe; the baseline's steps decide the default time.
        out: the comparison's folder; ``budget.json`` and ``calibration/`` are written there.
        seconds: the time; by default what AdamW takes for its steps.
        cache_dir: where tokens are cached.
        on_calibration: called before a recipe is timed.
        compiled: as for :func:`spectrim.lab.training.run.train`.

    Raises:
        LabError: neither a time nor AdamW is given, or the time is too short for a step of a recipe.
    """
    file = out / "budget.json"
    known = Budget.model_validate_json(file.read_text(encoding="utf-8")) if file.is_file() else None
    speeds = dict(known.step_seconds) if known else {}
    baseline = next((run for run in runs if run.recipe == BASELINE), None)
    if known is None and seconds is None and baseline is None:
        raise LabError(f"equal time without {BASELINE!r} among the recipes: give the time with --seconds")
    for run in runs:
        if run.recipe not in speeds:
            if on_calibration:
                on_calibration(run)
            folder = out / "calibration" / parse_recipe(run.recipe).folder
            speeds[run.recipe] = time_step(run, folder, cache_dir, compiled=compiled)
    if known is not None:
        seconds = known.seconds
    elif seconds is None:
        assert baseline is not None
        seconds = baseline.steps * speeds[BASELINE]
    # The last factor gives AdamW its own steps despite rounding.
    steps = {recipe: int(seconds / speed * (1 + 1e-9)) for recipe, speed in speeds.items()}
    for recipe, count in steps.items():
        if count < 1:
            raise LabError(f"--seconds {seconds:g}: one step of {recipe!r} takes {speeds[recipe]:.3g} s")
    budget = Budget(seconds=seconds, step_seconds=speeds, steps=steps)
    write_json(file, budget.model_dump(mode="json"))
    return budget


def time_step(run: TrainConfig, out: Path, cache_dir: Path | None, *, compiled: bool = False) -> float:
    """Mean seconds of a step, in a run of its own that is kept like any other."""
    length = {"steps": CALIBRATION_STEPS, "checkpoint_every": CALIBRATION_STEPS}
    once, unwatched = run.evaluation.model_copy(update={"times": 1}), MonitorConfig(every=0)
    alone = run.model_copy(update={**length, "evaluation": once, "monitor": unwatched})
    train(alone, out, resume=True, cache_dir=cache_dir, compiled=compiled)
    return fmean(step_seconds(record) for record in read_log(RunFolder(out).log_file)[WARMING_UP:])
