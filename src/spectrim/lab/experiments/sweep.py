"""A sweep: a search over the learning rate and further hyperparameters of each recipe, with equal budgets.

``runs/NAME/trials/RECIPE/trial-0003/`` is a run like any other. The searches are optuna studies in one journal file,
which any number of worker processes share, on one machine or on several with a common file system. A worker holds a
lock on its trial. When a worker is killed, its lock is released, and another worker resumes the trial from its last
checkpoint.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from spectrim.lab.data.tokens import prepare_tokens
from spectrim.lab.errors import Interrupted, LabError
from spectrim.lab.experiments.runs import (
    canonical_sweep,
    check_same_settings,
    check_same_text,
    dimensions_of,
    run_at,
)
from spectrim.lab.experiments.search_space import Categorical, spread_points, starting_point
from spectrim.lab.experiments.settings import SweepConfig
from spectrim.lab.files import create_text, lock_file, write_text
from spectrim.lab.logging.log import StepRecord
from spectrim.lab.recipes.names import parse_recipe, shown
from spectrim.lab.training.folder import RunFolder, stored_settings
from spectrim.lab.training.run import train

__all__ = ["Sweep", "open_sweep"]

FINISHED = ("COMPLETE", "PRUNED")
"""Optuna's states of trials that need no more training."""

LR_POINTS, OWN_POINTS = 5, 3
"""Points of a grid along the learning rate, and along the first other hyperparameter."""


def open_sweep(config: SweepConfig, out: Path, *, cache_dir: Path | None = None) -> "Sweep":
    """Begin a sweep in the folder ``out``, or resume the one there; safe to call repeatedly. Recipes and trials may be
    added; other settings need another name.

    Raises:
        LabError: the input is wrong. ``out`` is then unchanged.
    """
    config = canonical_sweep(config)
    file = out / "config.toml"
    check_sweep(config, out)
    key = prepare_tokens(config.data, cache_dir).key
    for path in sorted((out / "trials").glob("*/trial-*")):
        check_same_text(RunFolder(path), key)
    create_text(file, config.to_toml())
    sweep = Sweep(out)
    with sweep.locked():
        # Another process may have begun or extended a sweep here in the meantime.
        check_sweep(config, out)
        write_text(file, config.to_toml())
        sweep.config = config
        for recipe in config.recipes:
            sweep.enqueue(recipe)
    return sweep


def check_sweep(config: SweepConfig, out: Path) -> None:
    """Refuse to mix two sweeps in one folder. Writes nothing."""
    stored = stored_settings(SweepConfig, out, kind="sweep")
    if stored is None:
        return
    if dropped := [recipe for recipe in stored.recipes if recipe not in config.recipes]:
        raise LabError(f"sweep {str(out)!r} has recipes {', '.join(dropped)} too; name them again")
    if config.trials < stored.trials:
        raise LabError(f"sweep {str(out)!r} has {stored.trials} trials a recipe, {config.trials} are fewer")
    space, overrides = ({**getattr(config, key), **getattr(stored, key)} for key in ("space", "overrides"))
    free = {"recipes": config.recipes, "trials": config.trials, "space": space, "overrides": overrides}
    check_same_settings("sweep", out, stored.model_copy(update=free), config)


@dataclass
class Claim:
    """A trial of this process, and its lock."""

    recipe: str
    trial: Any
    lock: FileLock


class Diverged(Exception):  # noqa: N818 - an outcome, not an error
    """A validation loss is not finite, or the last one is above the first training loss."""


class Sweep:
    """A sweep's folder and its remaining trials."""

    def __init__(self, out: Path) -> None:
        """Open the sweep in a folder that :func:`open_sweep` has made.

        Raises:
            LabError: there is none.
        """
        config = stored_settings(SweepConfig, out)
        if config is None:
            raise LabError(f"{str(out)!r} holds no sweep: begin one with spectrim sweep RECIPE... --name {out.name}")
        self.out = out
        self.compiled = False
        """True if the models of trials are compiled."""
        self.config = config

    # -- Trials and searches -------------------------------------------------------------------------------------------

    def folder(self, recipe: str, number: int) -> RunFolder:
        """The run of a trial."""
        return RunFolder(self.out / "trials" / parse_recipe(recipe).folder / f"trial-{number:04d}")

    def budget(self, recipe: str) -> int:
        """All trials of a recipe."""
        return len(self.grid(recipe)) if self.config.method == "grid" else self.config.trials

    @property
    def spread(self) -> int:
        """The number of evenly spread trials before the search begins, the recipe's default among them."""
        return max(4, self.config.trials // 2)

    def grid(self, recipe: str) -> list[dict[str, Any]]:
        """The points of the recipe's grid: learning rates x the first other hyperparameter x all choices."""
        points: list[dict[str, Any]] = [{}]
        ranges = 0
        for key, dimension in dimensions_of(self.config, recipe).items():
            if not isinstance(dimension, Categorical):
                ranges += key != "lr"
                if ranges > 1:
                    continue  # stays at the recipe's default
            values = dimension.grid(LR_POINTS if key == "lr" else OWN_POINTS)
            points = [{**point, key: value} for point in points for value in values]
        return points

    def study(self, recipe: str) -> Any:
        """The optuna study of a recipe."""
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        journal = str(self.out / "study.journal")
        # On Windows only administrators may create the symbolic link that optuna locks with by default.
        lock = JournalFileOpenLock(journal) if os.name == "nt" else None
        storage = optuna.storages.JournalStorage(JournalFileBackend(journal, lock))
        return optuna.create_study(
            study_name=recipe, storage=storage, direction="minimize", load_if_exists=True, pruner=self.pruner()
        )

    def pruner(self) -> Any:
        """The pruner; it waits for half of a run, since high learning rates gain when they decay."""
        import optuna

        steps, trials = self.config.steps, self.config.trials
        if self.config.method == "grid" or self.config.pruner == "none":
            return optuna.pruners.NopPruner()
        if self.config.pruner == "hyperband":
            return optuna.pruners.HyperbandPruner(min_resource=max(1, steps // 9), max_resource=steps)
        return optuna.pruners.MedianPruner(n_startup_trials=max(3, trials // 3), n_warmup_steps=steps // 2)

    # -- Choosing a trial ----------------------------------------------------------------------------------------------

    def enqueue(self, recipe: str) -> None:
        """Enqueue the first points of a new study: its grid, or its defaults and evenly spread points."""
        study = self.study(recipe)
        if study.get_trials(deepcopy=False):
            return
        if self.config.method == "grid":
            points = self.grid(recipe)
        else:
            space, trials = dimensions_of(self.config, recipe), self.config.trials
            points = [starting_point(parse_recipe(recipe), space)]
            points += spread_points(space, min(trials, self.spread) - 1, seed=self.config.seed)
        for point in points:
            study.enqueue_trial(point)

    def lock(self, name: str, *, wait: bool = False) -> FileLock | None:
        """Take a lock of this sweep; None if another process has it. It is released when its holder ends."""
        (self.out / "locks").mkdir(exist_ok=True)
        return lock_file(self.out / "locks" / name, wait=wait)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from choosing trials."""
        lock = self.lock("choice", wait=True)
        assert lock is not None
        try:
            yield
        finally:
            lock.release()

    def try_lock(self, recipe: str, number: int) -> FileLock | None:
        """The lock on a trial, if no living process has it."""
        return self.lock(f"{parse_recipe(recipe).folder}-{number:04d}")

    def remaining(self, recipe: str) -> int:
        """The number of a recipe's trials that are not finished."""
        trials = self.study(recipe).get_trials(deepcopy=False)
        return max(0, self.budget(recipe) - sum(trial.state.name in FINISHED for trial in trials))

    def claim(self, only: str | None = None) -> Claim | None:
        """Take a trial: one whose worker has died, else a new one of the recipe with the fewest trials."""
        import optuna

        with self.locked():
            recipes = self.config.recipes if only is None else (only,)
            studies = {recipe: self.study(recipe) for recipe in recipes}
            begun: dict[str, int] = {}
            for recipe, study in studies.items():
                trials = study.get_trials(deepcopy=False)
                begun[recipe] = sum(trial.state.name in (*FINISHED, "RUNNING") for trial in trials)
                for trial in trials:
                    if trial.state.name == "RUNNING" and (lock := self.try_lock(recipe, trial.number)) is not None:
                        return Claim(recipe, self.with_point(recipe, optuna.trial.Trial(study, trial._trial_id)), lock)
            for recipe in sorted(recipes, key=lambda name: begun[name]):
                if begun[recipe] < self.budget(recipe):
                    # A new seed for every trial, so that workers do not get the same suggestion.
                    studies[recipe].sampler = optuna.samplers.TPESampler(
                        seed=(self.config.seed * 1_000_003 + begun[recipe]) % 2**32,
                        n_startup_trials=self.spread,
                        multivariate=True,
                        constant_liar=True,
                    )
                    trial = studies[recipe].ask()
                    lock = self.try_lock(recipe, trial.number)
                    assert lock is not None
                    return Claim(recipe, self.with_point(recipe, trial), lock)
        return None

    def with_point(self, recipe: str, trial: Any) -> Any:
        """Choose the missing hyperparameters of a trial."""
        searched = self.grid(recipe)[0] if self.config.method == "grid" else dimensions_of(self.config, recipe)
        for key, dimension in dimensions_of(self.config, recipe).items():
            if key not in searched:
                continue  # a grid leaves it at the recipe's default
            if isinstance(dimension, Categorical):
                trial.suggest_categorical(key, list(dimension.values))
            else:
                trial.suggest_float(key, dimension.low, dimension.high, log=dimension.log)
        return trial

    # -- Training ------------------------------------------------------------------------------------------------------

    def work(
        self,
        *,
        only: str | None = None,
        limit: int | None = None,
        cache_dir: Path | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> int:
        """Do trials until none is left, or ``limit`` of them; returns how many.

        Args:
            only: a recipe; by default all recipes, evenly.
            limit: the most trials to do.
            cache_dir: where tokens are cached.
            say: called with a line about every trial.
        """
        if only is not None and (only := parse_recipe(only).name) not in self.config.recipes:
            raise LabError(f"recipe {only!r} is not in this sweep, expected one of {', '.join(self.config.recipes)}")
        done = 0
        while (limit is None or done < limit) and (claim := self.claim(only)) is not None:
            try:
                outcome = self.run_trial(claim, cache_dir)
            finally:
                claim.lock.release()
            done += 1
            point = ", ".join(f"{key}={shown(value)}" for key, value in claim.trial.params.items())
            say(f"{claim.recipe} trial {claim.trial.number + 1} of {self.budget(claim.recipe)}: {outcome} at {point}")
        return done

    def run_trial(self, claim: Claim, cache_dir: Path | None) -> str:
        """Train one trial to its end, or until it is pruned; returns the outcome in words."""
        import optuna

        study, trial, states = self.study(claim.recipe), claim.trial, optuna.trial.TrialState
        config = run_at(self.config, claim.recipe, trial.params)
        frozen = {item.number: item for item in study.get_trials(deepcopy=False)}[trial.number]
        reported = set(frozen.intermediate_values)

        def on_step(record: StepRecord) -> None:
            if "val_loss" not in record or record["step"] == config.steps:
                return
            if not math.isfinite(record["val_loss"]):
                raise Diverged
            if record["step"] not in reported:
                trial.report(record["val_loss"], record["step"])
            if trial.should_prune():
                raise optuna.TrialPruned

        try:
            folder = self.folder(claim.recipe, trial.number)
            result = train(
                config, folder.path, resume=True, cache_dir=cache_dir, on_step=on_step, compiled=self.compiled
            )
            if result.final_loss is None or (result.dynamics is not None and result.dynamics.diverged):
                raise Diverged
        except Diverged:
            trial.set_user_attr("diverged", True)
            study.tell(trial, state=states.PRUNED)
            return "diverged"
        except optuna.TrialPruned:
            study.tell(trial, state=states.PRUNED)
            return "pruned"
        except (Interrupted, OSError):
            # Interrupted, or the disk is full: the trial can be resumed.
            raise
        except Exception:
            study.tell(trial, state=states.FAIL)
            raise
        study.tell(trial, result.final_loss, state=states.COMPLETE)
        return f"loss {result.final_loss:.4f}"
