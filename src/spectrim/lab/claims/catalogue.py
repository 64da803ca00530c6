"""Every check, and the run of those that were asked for."""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from spectrim.lab.claims import entry_noise, frank_wolfe, regression, spike_noise, training
from spectrim.lab.claims.claim import Check, Claim, Finding
from spectrim.lab.claims.settings import ClaimsConfig
from spectrim.lab.claims.studies import quiet, run_studies
from spectrim.lab.errors import LabError
from spectrim.lab.experiments.comparison import ComparisonListener
from spectrim.lab.experiments.settings import CompareConfig

__all__ = ["CHECKS", "Judged", "all_claims", "chosen", "judge_claims"]

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
        theory = not CHECKS[name].studies
        return not only or any(name.startswith(asked) or (asked == THEORY and theory) for asked in only)

    return [claim for name, claim in claims.items() if wanted(name)]


def judge_claims(
    config: ClaimsConfig,
    folder: Path,
    *,
    cache_dir: Path | None = None,
    listener: Callable[[CompareConfig, str], AbstractContextManager[ComparisonListener | None]] = quiet,
    on_finding: Callable[[Judged], None] = lambda _: None,
) -> list[Judged]:
    """Judge every chosen claim; training that is done already is not repeated.

    Args:
        config: budget, text and the choice of claims.
        folder: of the studies' runs; made if it is missing.
        cache_dir: where tokens are cached.
        listener: as for :func:`spectrim.lab.claims.studies.run_studies`.
        on_finding: called with each claim when it is judged.

    Raises:
        LabError: a name of ``config.only`` is unknown, or ``folder`` holds other settings.
    """
    checks = {claim: CHECKS[claim.name] for claim in chosen(config.only)}
    judged: dict[Claim, Judged] = {}

    def judge(results: Mapping[str, Any], trained: bool) -> None:
        for claim, check in checks.items():
            if bool(check.studies) == trained:
                judged[claim] = Judged(claim, check, check.judge(results))
                on_finding(judged[claim])

    # Theory first: it takes seconds, and is on the screen while training goes on.
    judge({}, trained=False)
    needed = {study for check in checks.values() for study in check.studies}
    if needed:
        judge(run_studies(config, needed, folder, cache_dir=cache_dir, listener=listener), trained=True)
    return [judged[claim] for claim in checks]
