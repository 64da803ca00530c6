"""The page of a comparison: losses, time and memory, spectra through training, every number and setting."""

from pathlib import Path
from typing import Any

from spectrim.lab.files import write_json, write_text
from spectrim.lab.recipes.names import BASELINE
from spectrim.lab.reports.comparison_report import (
    EQUAL_COLUMNS,
    EQUAL_NOTE,
    FREQUENCY_NOTE,
    NOTE,
    budget_note,
    frequency_rows,
    has_times,
    heading,
    table_rows,
    uneven_notes,
    verdict_rows,
)
from spectrim.lab.reports.markdown import markdown
from spectrim.lab.reports.page.figures import cost_figures, swatches, target_figure
from spectrim.lab.reports.page.html import Note, PagePart, Section, Table
from spectrim.lab.reports.page.loss_figure import Over, loss_figure
from spectrim.lab.reports.page.sections import Study, configuration, plan, provenance, reproduction, spectra
from spectrim.lab.reports.pictures import save_figure
from spectrim.lab.reports.words import comparison_headline

__all__ = ["comparison_part", "write_report"]


def write_report(summary: dict[str, Any], out: Path) -> None:
    """Write results.json, summary.md and the curves of the loss into ``out``; each replaces an older one whole."""
    curves: dict[Over, str] = {"tokens": "loss"}
    if has_times(summary):
        curves["time"] = "loss_over_time"
    pictures = {save_loss(summary, out, stem, over=over): f"{stem}.svg" for over, stem in curves.items()}
    study = Study(kind="compare", folder=out, summary=summary)
    write_text(out / "summary.md", markdown(comparison_part(study), pictures))
    write_json(out / "results.json", summary)


def save_loss(summary: dict[str, Any], out: Path, stem: str, *, over: Over) -> str:
    """Draw the loss of every recipe, with a legend in the order in which the lines end; returns the figure's title."""
    losses = {name: entry["final_loss"] for name, entry in summary["recipes"].items()}
    order = sorted(losses, key=lambda name: (losses[name] is None, losses[name] or 0.0))
    labels = {name: f"{name}  {'diverged' if losses[name] is None else f'{losses[name]:.3f}'}" for name in order}
    labels["AdamW's final loss"] = "AdamW's final loss"
    figure = loss_figure(summary, over=over)
    save_figure(figure, out, stem, labels=labels)
    return figure.title


def comparison_part(study: Study) -> PagePart:
    """The page's part on a comparison."""
    summary = study.summary
    return PagePart(
        title=f"Comparison {study.name}",
        headline=comparison_headline(summary),
        summary=[f"{heading(summary)}.", f"{provenance(summary)}."],
        swatches=swatches(summary["recipes"]),
        sections=study.sections(SECTIONS),
    )


def loss(study: Study) -> Section:
    figures = [loss_figure(study.summary, over="tokens")]
    if has_times(study.summary):
        figures.append(loss_figure(study.summary, over="time"))
    rows = verdict_rows(study.summary)
    return Section(title="Loss", items=[*figures, *([Table(caption="Against AdamW", rows=rows)] if rows else [])])


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


SECTIONS = (loss, target, cost, spectra, numbers, configuration, plan, reproduction)
"""In the order of reading."""
