"""Trains what the claims need: studies, which are comparisons of the lab, planned by a budget and kept in folders.

Learning rates are tuned first: every recipe is trained with one seed at the same factors on its default rate, and its
best rate is used with the other seeds.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from spectrim.lab.claims.settings import BUDGETS, Budget, ClaimsConfig
from spectrim.lab.config import EvaluationConfig, ModelConfig, MonitorConfig
from spectrim.lab.experiments.comparison import ComparisonListener, compare
from spectrim.lab.experiments.settings import RATES, CompareConfig
from spectrim.lab.logging.monitor_log import read_measurements
from spectrim.lab.recipes.names import BASELINE, default_hyperparameters, parse_recipe
from spectrim.lab.training.folder import RunFolder, stored_settings

__all__ = [
    "Listener",
    "Needs",
    "Study",
    "default_rate",
    "planned_runs",
    "quiet",
    "run_studies",
    "studies_of",
    "tuning_losses",
]

ADAMW_LIKE = {"embedding_lr": 16.0, "head_lr": 16.0}
CLIP_LIKE = {"lr": 0.016, "embedding_lr": 4.0, "head_lr": 4.0, "clip_bound": 0.02}
UNSEARCHED: Mapping[str, Mapping[str, float]] = {
    **dict.fromkeys(("signum", "ademamix", "mars"), ADAMW_LIKE),
    "signum+clip": {**CLIP_LIKE, "lr": 0.005},
    **dict.fromkeys(("ademamix+clip", "mars+clip"), CLIP_LIKE),
}
"""Rates for recipes without a search: those of adamw and adamw+clip; a third for signs, which are larger."""

SMALL_BATCH = 2
"""Sequences in a batch of the study "small-batch"."""

CORRUPTED = 0.05
"""Share of corrupted batches in the study "corrupted"."""

Needs = Mapping[str, Collection[str]]
"""The recipes that must be trained in each study."""

Listener = Callable[[CompareConfig, str], AbstractContextManager[ComparisonListener | None]]
"""Returns the listener of a study from the study's settings and name."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A comparison, as its differences from the budget's other ones. The claims decide which recipes it trains."""

    name: str
    preset: str
    seeds: tuple[int, ...]
    factor: float | None = None
    """Factor on the default rates, for tuning; None to use the tuned rates."""
    times: float = 1.0
    """Factor on the tuned rates."""
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Hyperparameters by recipe."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the text and its batches."""


def studies_of(budget: Budget) -> Iterator[Study]:
    """Every study of a budget, in the order in which they run; those that tune come first."""
    first = budget.presets[0]
    for factor in budget.factors:
        yield Study(name=f"tune-{factor:g}", preset=first, seeds=(0,), factor=factor)
    shared: dict[str, Any] = {"preset": first, "seeds": budget.seeds}
    yield Study(name="recipes", **shared)
    for times in budget.raised:
        yield Study(name=f"rate-x{times}", times=times, **shared)
    yield Study(name="hard", overrides={"adamw+clip": {"clip_form": "hard"}}, **shared)
    yield Study(name="matrices", overrides={"adamw+clip": {"clip_scope": "matrices"}}, **shared)
    for rank in budget.ranks:
        yield Study(name=f"rank-{rank:g}", overrides={"spectra": {"rank_ratio": rank}}, **shared)
    # A spike of all directions leaves no tail, so nothing is shaped.
    yield Study(name="unshaped", overrides={"spectra": {"rank_ratio": 1.0}}, **shared)
    yield Study(name="power-5", overrides={"spectra": {"power_steps": 5}}, **shared)
    yield Study(name="corrupted", data={"corrupted": CORRUPTED}, **shared)
    yield Study(name="small-batch", data={"batch_size": SMALL_BATCH}, **shared)
    one: dict[str, Any] = {"preset": first, "seeds": budget.seeds[:1]}
    for size in budget.batches:
        yield Study(name=f"batch-{size}", data={"batch_size": size}, **one)
    for size in budget.vocabularies:
        yield Study(name=f"vocabulary-{size}", data={"vocabulary_size": size}, **one)
    for preset in budget.presets[1:]:
        yield Study(name=f"size-{preset}", preset=preset, seeds=budget.seeds)
    if budget.corpora:
        yield Study(name="python", data={"sources": (python_sources(),)}, **shared)


def python_sources() -> str:
    """A pattern of the standard library's modules, which every machine has."""
    import sysconfig

    return str(Path(sysconfig.get_paths()["stdlib"]) / "*.py")


def planned(needs: Needs, budget: Budget) -> Iterator[tuple[Study, list[str]]]:
    """The studies of a budget that are needed, each with its recipes, AdamW first; every recipe is tuned."""
    studies = list(studies_of(budget))
    tuned = {recipe for study in studies for recipe in needs.get(study.name, ())}
    for study in studies:
        recipes = needs.get(study.name, ()) if study.factor is None else tuned
        if recipes:
            yield study, sorted(recipes, key=lambda recipe: (recipe != BASELINE, recipe))


def planned_runs(needs: Needs, budget: Budget) -> int:
    """The number of runs in the studies of these needs."""
    return sum(len(recipes) * len(study.seeds) for study, recipes in planned(needs, budget))


def quiet(settings: CompareConfig, study: str) -> AbstractContextManager[ComparisonListener | None]:
    """A listener that ignores progress."""
    return nullcontext()


def run_studies(
    config: ClaimsConfig, needs: Needs, folder: Path, *, cache_dir: Path | None = None, listener: Listener = quiet
) -> dict[str, dict[str, Any]]:
    """Train what is missing, and return the ``results.json`` of every needed study.

    Each has measurements of AdamW's gradients too: "spike_shares" at every measurement, and "spike_range" over matrices
    and "tail_index" at the last one.

    Args:
        config: budget and text.
        needs: recipes of each study. Studies that tune are added; studies that the budget lacks are left out.
        folder: holds a folder for each study.
        cache_dir: where tokens are cached.
        listener: see :data:`Listener`.
    """
    budget = BUDGETS[config.budget]
    results: dict[str, dict[str, Any]] = {}
    for study, recipes in planned(needs, budget):
        out = folder / study.name
        # A comparison keeps the recipes of earlier calls.
        before = stored_settings(CompareConfig, out)
        every = list(dict.fromkeys((*(before.recipes if before else ()), *recipes)))
        settings = settings_of(study, every, config, budget, results)
        with listener(settings, study.name) as progress:
            summary = compare(settings, out, cache_dir=cache_dir, monitor=progress)
        results[study.name] = {**summary, **measured_gradients(out)}
    return results


def measured_gradients(study: Path) -> dict[str, Any]:
    """The monitor's measurements of AdamW's gradients, over the seeds of a study."""
    runs = [read_measurements(RunFolder(path).monitor_file) for path in sorted((study / BASELINE).glob("seed-*"))]
    shares = [[values_in(record, "gradient_spike_share") for record in run] for run in runs]
    last = [share for run in shares if run for share in run[-1]]
    tails = [values_in(run[-1], "gradient_tail_index") for run in runs if run]
    medians = [[median(matrices) for matrices in run if matrices] for run in shares]
    return {
        "spike_shares": [fmean(seeds) for seeds in zip(*medians, strict=False)],
        "spike_range": [min(last), max(last)] if last else None,
        "tail_index": fmean(map(median, tails)) if tails and all(tails) else None,
    }


def values_in(record: Mapping[str, Any], key: str) -> list[float]:
    """A quantity of every matrix in a record of the monitor."""
    return [value for entry in record["parameters"].values() if (value := entry.get(key)) is not None]


def settings_of(
    study: Study, recipes: Sequence[str], config: ClaimsConfig, budget: Budget, done: Mapping[str, Mapping[str, Any]]
) -> CompareConfig:
    """The settings of a study's comparison."""
    if study.factor is None:
        factors = {recipe: study.times * tuned_factor(recipe, done) for recipe in recipes}
    else:
        factors = dict.fromkeys(recipes, study.factor)
    rates: dict[str, Any] = {key: unsearched(key, recipes) for key in RATES if key != "lr"}
    return CompareConfig(
        recipes=tuple(recipes),
        seeds=study.seeds,
        steps=budget.steps,
        data=config.data.model_copy(update=dict(study.data)),
        model=ModelConfig(preset=study.preset),
        evaluation=EvaluationConfig(times=budget.evaluations),
        monitor=MonitorConfig(every=max(10, budget.steps // 8), exact_times=0),
        precision=config.precision,
        device=config.device,
        lr={recipe: factor * default_rate(recipe) for recipe, factor in factors.items()},
        **rates,
        overrides={recipe: dict(values) for recipe, values in study.overrides.items() if recipe in recipes},
    )


def unsearched(key: str, recipes: Sequence[str]) -> dict[str, float]:
    """A rate of :data:`UNSEARCHED` for those of the recipes that have it."""
    return {recipe: rates[key] for recipe, rates in UNSEARCHED.items() if recipe in recipes and key in rates}


def default_rate(recipe: str) -> float:
    """The learning rate that the factors of tuning refer to."""
    return unsearched("lr", [recipe]).get(recipe) or default_hyperparameters(parse_recipe(recipe)).lr


def tuned_factor(recipe: str, done: Mapping[str, Mapping[str, Any]]) -> float:
    """The factor on the default rate with the lowest loss in the studies that tune; 1 for a recipe not among them."""
    losses = {factor: loss for factor, loss in tuning_losses(recipe, done).items() if loss is not None}
    return min(losses, key=losses.__getitem__) if losses else 1.0


def tuning_losses(recipe: str, done: Mapping[str, Mapping[str, Any]]) -> dict[float, float | None]:
    """The final loss of a recipe at every factor on its default rate that was tried; None where it diverged."""
    return {
        float(name.removeprefix("tune-")): summary["recipes"][recipe]["final_loss"]
        for name, summary in done.items()
        if name.startswith("tune-") and recipe in summary["recipes"]
    }
