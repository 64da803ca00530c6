"""Every check, and the run of those that were asked for."""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from spectrim.lab.claims import entry_noise, frank_wolfe, regression, spike_noise, training
from spectrim.lab.claims.claim import Check, Claim, Finding
from spectrim.lab.claims.settings import ClaimsConfig
from spectrim.lab.claims.studies import Listener, default_rate, quiet, run_studies, tuning_losses
from spectrim.lab.errors import LabError
from spectrim.lab.settings import Config

__all__ = ["CHECKS", "Judged", "Rates", "all_claims", "chosen", "judge_claims", "needs_of"]

CHECKS: Mapping[str, Check] = {
    **frank_wolfe.CHECKS,
    **spike_noise.CHECKS,
    **entry_noise.CHECKS,
    **regression.CHECKS,
    **training.CHECKS,
}
"""The check of every claim in ``claims.toml``, by its name."""

THEORY = "theory"
"""Stands for all claims that need no training."""


@dataclass(frozen=True)
class Judged:
    """A claim, how it was judged, and the finding."""

    claim: Claim
    check: Check
    finding: Finding


class Rates(Config):
    """The learning rates that were tried for a recipe, and the final loss at each; None where the run diverged."""

    recipe: str
    losses: Mapping[float, float | None]


@cache
def all_claims() -> dict[str, Claim]:
    """The claims by name, in the order of the report."""
    text = (resources.files("spectrim.lab.claims") / "claims.toml").read_text(encoding="utf-8")
    return {name: Claim(name=name, **entry) for name, entry in tomllib.loads(text).items()}


def chosen(only: Sequence[str] | None) -> list[Claim]:
    """The claims whose names begin with one of these; all of them for None.

    Raises:
        LabError: a name is the beginning of none.
    """
    claims = all_claims()
    for asked in only or ():
        if asked != THEORY and not any(name.startswith(asked) for name in claims):
            raise LabError(f"--only {asked}: no claim begins so, expected {THEORY} or one of {', '.join(claims)}")

    def wanted(name: str) -> bool:
        theory = not CHECKS[name].needs
        return not only or any(name.startswith(asked) or (asked == THEORY and theory) for asked in only)

    return [claim for name, claim in claims.items() if wanted(name)]


def needs_of(claims: Sequence[Claim]) -> dict[str, set[str]]:
    """The recipes that these claims need in each study."""
    needs: dict[str, set[str]] = {}
    for claim in claims:
        for study, recipes in CHECKS[claim.name].needs.items():
            needs.setdefault(study, set()).update(recipes)
    return needs


def judge_claims(
    config: ClaimsConfig,
    folder: Path,
    *,
    cache_dir: Path | None = None,
    listener: Listener = quiet,
    on_finding: Callable[[Judged], None] = lambda _: None,
) -> tuple[list[Judged], list[Rates]]:
    """Judge every chosen claim; training that is done already is not repeated.

    Args:
        config: budget, text and the choice of claims.
        folder: of the studies' runs; made if it is missing.
        cache_dir: where tokens are cached.
        listener: see :data:`~spectrim.lab.claims.studies.Listener`.
        on_finding: called with each claim when it is judged.

    Returns:
        The claims in the order of the report, and the learning rates that were tried.

    Raises:
        LabError: a name of ``config.only`` is unknown, or ``folder`` holds other settings.
    """
    claims = chosen(config.only)
    judged: dict[Claim, Judged] = {}

    def judge(results: Mapping[str, Any], trained: bool) -> None:
        for claim in claims:
            check = CHECKS[claim.name]
            if bool(check.needs) == trained:
                judged[claim] = Judged(claim, check, check.judge(results))
                on_finding(judged[claim])

    # Theory first: it takes seconds, and is on the screen while training goes on.
    judge({}, trained=False)
    rates: list[Rates] = []
    if needs := needs_of(claims):
        results = run_studies(config, needs, folder, cache_dir=cache_dir, listener=listener)
        judge(results, trained=True)
        recipes = {recipe for summary in results.values() for recipe in summary["recipes"]}
        rates = [Rates(recipe=recipe, losses=losses_by_rate(recipe, results)) for recipe in sorted(recipes)]
    return [judged[claim] for claim in claims], rates


def losses_by_rate(recipe: str, results: Mapping[str, Any]) -> dict[float, float | None]:
    """The final loss at every learning rate that was tried."""
    default = default_rate(recipe)
    return {default * factor: loss for factor, loss in tuning_losses(recipe, results).items()}
