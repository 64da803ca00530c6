"""The page of a sweep: loss against learning rate, winners, spectra and settings."""

from spectrim.lab.reports.page.figures import rate_figure, swatches
from spectrim.lab.reports.page.html import Note, PagePart, Section, Table
from spectrim.lab.reports.page.sections import Study, configuration, plan, reproduction, spectra
from spectrim.lab.reports.sweep_report import HEADINGS, remarks, rows
from spectrim.lab.reports.sweep_report import NOTE as SWEEP_NOTE
from spectrim.lab.reports.words import sweep_headline

__all__ = ["sweep_part"]


def sweep_part(study: Study) -> PagePart:
    """The page's part on a sweep."""
    return PagePart(
        title=f"Sweep {study.name}",
        headline=sweep_headline(study.summary),
        summary=remarks(study.summary),
        swatches=swatches(study.summary),
        sections=study.sections(SECTIONS),
    )


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


SECTIONS = (rates, winners, spectra, configuration, plan, reproduction)
"""In the order of reading."""
