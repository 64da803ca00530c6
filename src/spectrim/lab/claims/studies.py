"""The training runs that claims are judged by: comparisons of the lab, planned by a budget and kept in folders.

Rates are tuned first: every recipe is trained with one seed at a grid of factors on its default learning rate, and its
best one is used with the seeds that claims are judged by. All recipes have the same number of trials.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from spectrim.lab.claims.settings import BUDGETS, Budget, ClaimsConfig
from spectrim.lab.config import EvaluationConfig, ModelConfig, MonitorConfig
from spectrim.lab.experiments.comparison import ComparisonListener, compare
from spectrim.lab.experiments.settings import CompareConfig
from spectrim.lab.logging.monitor_log import read_measurements
from spectrim.lab.recipes.names import BASELINE, default_hyperparameters, parse_recipe
from spectrim.lab.training.folder import RunFolder

__all__ = ["ROBUST_FACTORS", "Study", "quiet", "run_studies", "studies_of"]

RECIPES = (
    *("adamw", "adamw+clip", "signum", "signum+clip", "ademamix", "ademamix+clip", "muon", "spectra"),
    *("adamw+shrink", "muon+shrink", "adamw+shrink+clip", "spectra+clip", "adamw+preclip"),
)

SHORT = ("adamw", "adamw+clip", "muon", "spectra")
"""The recipes that are trained at other sizes and on other text."""

ROBUST = ("adamw", "adamw+clip", "muon", "spectra")
ROBUST_FACTORS = (4, 16)
"""Factors on the tuned learning rate, for the largest rates that are safe."""

UNSEARCHED = {"signum": 16.0, "signum+clip": 4.0, "ademamix": 16.0, "ademamix+clip": 4.0}
"""Factors on the rate of embeddings and head for recipes that no search has covered: those of AdamW and adamw+clip."""

RANKS = (0.005, 0.05, 0.1)
"""Rank ratios of Spectra beside the published 0.015."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A comparison: what differs from the others of its budget."""

    name: str
    recipes: tuple[str, ...]
    preset: str
    seeds: tuple[int, ...]
    factor: float | None = None
    """On the default rates, for tuning; None for the tuned ones."""
    times: float = 1.0
    """On the tuned rates."""
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sources: tuple[str, ...] = ()


def studies_of(budget: Budget) -> Iterator[Study]:
    """Every study of a budget, in the order in which they run; those that tune come first."""
    first = budget.presets[0]
    for factor in budget.factors:
        yield Study(name=f"tune-{factor:g}", recipes=RECIPES, preset=first, seeds=(0,), factor=factor)
    shared: dict[str, Any] = {"preset": first, "seeds": budget.seeds}
    yield Study(name="recipes", recipes=RECIPES, **shared)
    for times in ROBUST_FACTORS:
        yield Study(name=f"rate-x{times}", recipes=ROBUST, times=times, **shared)
    yield Study(name="hard", recipes=("adamw+clip",), overrides={"adamw+clip": {"clip_form": "hard"}}, **shared)
    yield Study(
        name="matrices", recipes=("adamw+clip",), overrides={"adamw+clip": {"clip_scope": "matrices"}}, **shared
    )
    for rank in RANKS:
        yield Study(name=f"rank-{rank:g}", recipes=("spectra",), overrides={"spectra": {"rank_ratio": rank}}, **shared)
    for preset in budget.presets[1:]:
        yield Study(name=f"size-{preset}", recipes=SHORT, preset=preset, seeds=budget.seeds)
    if budget.corpora:
        yield Study(name="python", recipes=SHORT, sources=(python_sources(),), **shared)


def python_sources() -> str:
    """A pattern of the standard library's modules, which every machine has."""
    import sysconfig

    return str(Path(sysconfig.get_paths()["stdlib"]) / "*.py")


def quiet(settings: CompareConfig, study: str) -> AbstractContextManager[ComparisonListener | None]:
    """Tells nobody about progress."""
    return nullcontext()


def run_studies(
    config: ClaimsConfig,
    needed: Collection[str],
    folder: Path,
    *,
    cache_dir: Path | None = None,
    listener: Callable[[CompareConfig, str], AbstractContextManager[ComparisonListener | None]] = quiet,
) -> dict[str, dict[str, Any]]:
    """Train what is not trained yet, and return what ``results.json`` of every needed study holds.

    Args:
        config: budget and text.
        needed: names of studies; those that tune are added, those that the budget lacks are left out.
        folder: holds a folder for each study.
        cache_dir: where tokens are cached.
        listener: makes, from a study's settings and name, what is told about its progress.
    """
    budget = BUDGETS[config.budget]
    results: dict[str, dict[str, Any]] = {}
    for study in studies_of(budget):
        if study.factor is None and study.name not in needed:
            continue
        settings = settings_of(study, config, budget, results)
        progress = listener(settings, study.name)
        with progress as told:
            summary = compare(settings, folder / study.name, cache_dir=cache_dir, monitor=told)
        results[study.name] = {**summary, "spike_shares": spike_shares(folder / study.name)}
    return results


def spike_shares(study: Path) -> list[float]:
    """AdamW's spike share at every measurement of its runs: the median over matrices, the mean over seeds."""
    runs = [read_measurements(RunFolder(path).monitor_file) for path in sorted((study / BASELINE).glob("seed-*"))]
    shares = [[median(found) for record in run if (found := list(shares_in(record)))] for run in runs]
    return [fmean(column) for column in zip(*shares, strict=False)]


def shares_in(record: Mapping[str, Any]) -> Iterator[float]:
    """The spike share of every matrix's gradient in a record."""
    for entry in record["parameters"].values():
        share = entry.get("gradient_spike_share")
        if share is not None:
            yield share


def settings_of(
    study: Study, config: ClaimsConfig, budget: Budget, done: Mapping[str, Mapping[str, Any]]
) -> CompareConfig:
    """The comparison that a study is."""
    data = config.data.model_copy(update={"sources": study.sources}) if study.sources else config.data
    if study.factor is None:
        factors = {recipe: study.times * tuned_factor(recipe, done) for recipe in study.recipes}
    else:
        factors = dict.fromkeys(study.recipes, study.factor)
    unsearched = {recipe: factor for recipe, factor in UNSEARCHED.items() if recipe in study.recipes}
    return CompareConfig(
        recipes=study.recipes,
        seeds=study.seeds,
        steps=budget.steps,
        data=data,
        model=ModelConfig(preset=study.preset),
        evaluation=EvaluationConfig(times=budget.evaluations),
        monitor=MonitorConfig(every=max(10, budget.steps // 8), exact_times=0),
        precision=config.precision,
        device=config.device,
        lr={recipe: factor * default_hyperparameters(parse_recipe(recipe)).lr for recipe, factor in factors.items()},
        embedding_lr=unsearched,
        head_lr=unsearched,
        overrides={recipe: dict(values) for recipe, values in study.overrides.items()},
    )


def tuned_factor(recipe: str, done: Mapping[str, Mapping[str, Any]]) -> float:
    """The factor on the default rate with the lowest loss in the studies that tune; 1 for a recipe not among them."""
    losses = {
        float(name.removeprefix("tune-")): loss
        for name, summary in done.items()
        if name.startswith("tune-")
        and recipe in summary["recipes"]
        and (loss := summary["recipes"][recipe]["final_loss"]) is not None
    }
    return min(losses, key=losses.__getitem__) if losses else 1.0
