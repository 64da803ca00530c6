"""The page of a sweep: loss against learning rate, winners, spectra and settings."""

from pathlib import Path
from typing import Any

from spectrim.lab.files import write_json, write_text
from spectrim.lab.reports.markdown import markdown
from spectrim.lab.reports.page.figures import rate_figure, swatches
from spectrim.lab.reports.page.html import Note, PagePart, Section, Table
from spectrim.lab.reports.page.sections import Study, configuration, plan, provenance, reproduction, spectra
from spectrim.lab.reports.pictures import save_figure
from spectrim.lab.reports.sweep_report import NOTE as SWEEP_NOTE
from spectrim.lab.reports.sweep_report import remarks, rows
from spectrim.lab.reports.words import sweep_headline

__all__ = ["sweep_part", "write_report"]


def write_report(summary: dict[str, Any], out: Path) -> None:
    """Write results.json, summary.md and the picture into the sweep's folder."""
    figure = rate_figure(summary)
    save_figure(figure, out, "learning_rates")
    study = Study(kind="sweep", folder=out, summary=summary)
    write_text(out / "summary.md", markdown(sweep_part(study), {figure.title: "learning_rates.svg"}))
    write_json(out / "results.json", summary)


def sweep_part(study: Study) -> PagePart:
    """The page's part on a sweep."""
    return PagePart(
        title=f"Sweep {study.name}",
        headline=sweep_headline(study.summary),
        summary=[f"{provenance(study.summary)}.", *tokens_used(study.summary), *remarks(study.summary)],
        swatches=swatches(study.summary["recipes"]),
        sections=study.sections(SECTIONS),
    )


def tokens_used(summary: dict[str, Any]) -> list[str]:
    used = [f"`{recipe}` {entry['tokens']:,}" for recipe, entry in summary["recipes"].items() if "tokens" in entry]
    return [f"Tokens used, those of pruned trials included: {', '.join(used)}."] if used else []


def rates(study: Study) -> Section:
    return Section(title="Loss against learning rate", items=[rate_figure(study.summary)])


def winners(study: Study) -> Section:
    table = Table(caption="The best trial of every recipe", rows=rows(study.summary), words=True)
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


SECTIONS = (rates, winners, spectra, configuration, plan, reproduction)
"""In the order of reading."""
