"""The page's part on ``spectrim spectrum``: the reading, figures, all numbers and the command."""

import shlex
from pathlib import Path
from typing import Any

from spectrim.lab.reports.markdown import markdown
from spectrim.lab.reports.page.figures import swatches
from spectrim.lab.reports.page.html import Listing, Note, PagePart, Section, Table
from spectrim.lab.reports.page.sections import Study, figures, measurements
from spectrim.lab.reports.shareable import SHORTENED, shareable, short
from spectrim.lab.reports.spectra.dot_figures import spike_figures, structure_figures, weight_figures
from spectrim.lab.reports.spectra.matrix_table import CAPTION, WEIGHTS_CAPTION, gradient_rows, weight_rows
from spectrim.lab.reports.spectra.spectrum_figures import (
    direction_figure,
    operator_figure,
    spectrum_figure,
    tail_figure,
)
from spectrim.lab.reports.words import reading_notes, reading_rows, side_by_side_rows, spectrum_headline
from spectrim.lab.training.folder import RunFolder

__all__ = ["reading_text", "spectrum_part"]

HOW = "Medians and ranges are over matrices. docs/spectrum.md says what each number means, and how it is debiased."


def reading_text(study: Study) -> str:
    """The reading of all subjects as Markdown."""
    sections = study.sections((reading, reading_of_each))
    headline = spectrum_headline(study.summary)
    part = PagePart(title=f"Spectra {study.name}", headline=headline, summary=(), swatches=(), sections=sections)
    return markdown(part, {}, files="The numbers are in `spectrum.json`, pictures beside it.")


def spectrum_part(study: Study) -> PagePart:
    """The page's part on spectra."""
    return PagePart(
        title=f"Spectra {study.name}",
        headline=spectrum_headline(study.summary),
        summary=[],
        swatches=swatches(study.summary["subjects"]),
        sections=study.sections(SECTIONS),
    )


def reading(study: Study) -> Section:
    """Medians of one subject with verdicts, or medians of several subjects side by side."""
    subjects = study.summary["subjects"]
    if len(subjects) > 1:
        rows = side_by_side_rows(subjects)
        return Section(
            title="Side by side", items=[Table(caption="Medians over matrices", rows=rows), Note(lines=[HOW])]
        )
    [(name, subject)] = subjects.items()
    return Section(title="Reading", items=reading_of(name, subject))


def reading_of(name: str, subject: dict[str, Any]) -> list[Table | Note]:
    notes = [Note(lines=lines, bullets=True)] if (lines := reading_notes(subject)) else []
    return [Table(caption=f"What was measured of {name}", rows=reading_rows(subject)), *notes, Note(lines=[HOW])]


def reading_of_each(study: Study) -> Section | None:
    """The whole reading of each of several subjects, below the figures."""
    subjects = study.summary["subjects"]
    if len(subjects) == 1:
        return None
    items = [item for name, subject in subjects.items() for item in reading_of(name, subject)]
    return Section(title="Reading of each", items=items)


def spike_and_tail(study: Study) -> Section | None:
    subjects = study.summary["subjects"]
    made = [*spike_figures(subjects), spectrum_figure(subjects), direction_figure(subjects)]
    return figures("Spike and tail", made)


def noise(study: Study) -> Section | None:
    subjects = study.summary["subjects"]
    made = [*structure_figures(subjects), tail_figure(subjects), operator_figure(subjects)]
    return figures("Structure of the noise", made)


def weights(study: Study) -> Section:
    subjects = study.summary["subjects"]
    totals = [["model", "norm of all weights"]]
    totals += [[name, f"{subject['weight_norm']:.4g}"] for name, subject in subjects.items()]
    made = [figure for figure in weight_figures(subjects) if figure]
    return Section(title="Weights", items=[Table(caption="Norm of all weights", rows=totals), *made])


def through_training(study: Study) -> Section | None:
    return measurements({name: run_of(subject) for name, subject in study.summary["subjects"].items()})


def run_of(subject: dict[str, Any]) -> RunFolder | None:
    path = Path(subject["path"])
    return {"run": RunFolder(path), "checkpoint": RunFolder(path.parent.parent)}.get(subject["kind"])


def numbers(study: Study) -> Section:
    tables = [
        Table(caption=f"Gradients of {name}", rows=rows)
        for name, subject in study.summary["subjects"].items()
        if (rows := gradient_rows(subject))
    ]
    notes = [CAPTION] if tables else []
    weights = Table(caption=f"Weights: {WEIGHTS_CAPTION}", rows=weight_rows(study.summary))
    return Section(title="All numbers", items=[*tables, weights, Note(lines=[*notes, "spectrum.json holds the rest."])])


def configuration(study: Study) -> Section:
    """What was measured, and the command that measures it again."""
    config = shareable(study.summary["config"])
    facts = [["setting", "value"]]
    for name, subject in study.summary["subjects"].items():
        step = "" if subject["step"] is None else f", step {subject['step']:,} of {subject['steps']:,}"
        facts.append([name, f"{subject['kind']} {short(subject['path'])}{step}"])
        if text := subject["text"]:
            size = f"{text['batches']} of {text['batch_size']} x {text['sequence_length']} tokens"
            where = f"from batch {text['first_batch']}, seed {text['seed']}"
            facts.append([f"batches of {name}", f"{size}, {where}"])
    facts += [[key, str(value)] for key, value in study.summary["environment"].items()]
    command = ["spectrim", "spectrum", *config["paths"], "--batches", str(config["batches"])]
    for flag, key in (("--parameters", "parameters"), ("--threshold", "thresholds"), ("--data", "data")):
        for value in config[key]:
            command += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    if config["layers"]:
        command += ["--layers", ",".join(map(str, config["layers"]))]
    if config["seed"] is not None:
        command += ["--seed", str(config["seed"])]
    command += ["--out", f"{study.name}-again"]
    same = f"The same command gives the same numbers where torch, threads and device are the same. {SHORTENED}"
    return Section(
        title="Configuration",
        items=[
            Table(caption="What was measured, and where", rows=facts, words=True),
            Note(lines=[same]),
            Listing(title="Command", text=shlex.join(command)),
        ],
    )


SECTIONS = (reading, spike_and_tail, noise, weights, through_training, reading_of_each, numbers, configuration)
"""In the order of reading."""
