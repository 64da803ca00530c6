"""``spectrim claims``: judges the claims of the three papers on this machine."""

import sys
from pathlib import Path
from typing import Any

from spectrim.lab.claims.settings import ClaimsConfig
from spectrim.lab.cli.flags import configure, with_settings
from spectrim.lab.cli.shared_options import CacheDir, Json, Name, RunsDir, check_name, show
from spectrim.lab.tables import TextTable

__all__ = ["claims_command"]


@with_settings(ClaimsConfig)
def claims_command(
    given: dict[str, Any],
    name: Name = "claims",
    runs_dir: RunsDir = Path("runs"),
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Judge the claims of the three papers on this machine: holds, does not hold, or cannot be judged here.

    Training that is done is not repeated, so an interrupted call goes on when it is given again.
    """
    from spectrim.lab.claims.catalogue import Judged, chosen, judge_claims, needs_of
    from spectrim.lab.claims.report import as_dict, write_claims
    from spectrim.lab.claims.settings import BUDGETS
    from spectrim.lab.claims.studies import planned_runs
    from spectrim.lab.experiments.settings import CompareConfig
    from spectrim.lab.logging.terminal import TerminalProgress
    from spectrim.lab.training.device import choose_device, environment

    config = configure(ClaimsConfig, None, given)
    check_name(name)
    folder = runs_dir / name / config.budget

    def progress(settings: CompareConfig, study: str) -> TerminalProgress:
        print(f"study {study}", file=sys.stderr)
        return TerminalProgress(runs=len(settings.recipes) * len(settings.seeds), steps=settings.steps)

    def told(one: Judged) -> None:
        print(f"{one.claim.name}: {one.finding.verdict}", file=sys.stderr)

    if runs := planned_runs(needs_of(chosen(config.only)), BUDGETS[config.budget]):
        print(f"{runs} runs of {BUDGETS[config.budget].steps} steps, less those that are done", file=sys.stderr)
    judged, rates = judge_claims(config, folder, cache_dir=cache_dir, listener=progress, on_finding=told)
    write_claims(judged, rates, config, environment(choose_device(config.device)), folder)
    header = ["claim", "verdict", "measured"]
    rows = [header, *([one.claim.name, one.finding.verdict, one.finding.measured] for one in judged)]
    show([as_dict(one) for one in judged], as_json, TextTable(rows, words=("verdict", "measured")))
    print(f"written to {folder}: results.md, report.html, results.json", file=sys.stderr)
