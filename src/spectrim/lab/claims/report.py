"""The report on claims: JSON, a Markdown page, an HTML page, and a picture of every effect with its interval."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from spectrim.lab.claims.catalogue import Judged, Rates, all_claims
from spectrim.lab.claims.claim import Finding, Interval, Verdict
from spectrim.lab.claims.settings import BUDGETS, ClaimsConfig
from spectrim.lab.files import parse_json, write_json, write_text
from spectrim.lab.reports.page.figures import colour, layout
from spectrim.lab.reports.page.html import Figure, Note, PagePart, Section, Table, write_page
from spectrim.lab.reports.pictures import save_figure
from spectrim.lab.tables import markdown_table

__all__ = ["as_dict", "write_claims"]

PAPERS = {
    "2603.14315": "SPECTRA: spectral clipping (arXiv 2603.14315)",
    "2602.11185": "Spectra: the spike-aware optimizer (arXiv 2602.11185)",
    "2605.27733": "Entry-wise shrinkage (arXiv 2605.27733)",
    "none": "Mixtures that nobody has published",
}

PLURAL = {"holds": "hold", "does not hold": "do not hold"}

HEADER = ("claim", "paper says", "verdict", "measured here", "repeat")


@dataclass(frozen=True)
class Report:
    """The content of a report, and what it writes."""

    judged: Sequence[Judged]
    rates: Sequence[Rates]
    config: ClaimsConfig
    environment: Mapping[str, Any]

    def results(self) -> dict[str, Any]:
        """The content of ``results.json``."""
        return {
            "kind": "claims",
            "config": self.config.model_dump(mode="json"),
            "environment": dict(self.environment),
            "claims": [as_dict(one) for one in self.judged],
            "rates": [one.model_dump(mode="json") for one in self.rates],
        }

    def tables(self) -> Iterator[tuple[str, list[list[str]]]]:
        """Title and rows of every table, the header first: claims by paper, then learning rates."""
        for paper, title in PAPERS.items():
            if rows := [row_of(one, self.config) for one in self.judged if one.claim.paper == paper]:
                yield title, [list(HEADER), *rows]
        if self.rates:
            yield (
                "Learning rates that were tried",
                [["recipe", "best", "learning rate: loss"], *map(rates_row, self.rates)],
            )

    def headline(self) -> str:
        """The number of claims with each verdict."""
        counts = {verdict: sum(one.finding.verdict == verdict for one in self.judged) for verdict in get_args(Verdict)}
        told = ", ".join(f"{count} {PLURAL.get(verdict, verdict)}" for verdict, count in counts.items() if count)
        return f"{len(self.judged)} claims: {told}"

    def about(self) -> list[str]:
        """Sentences about the training runs; none if no claim needed them."""
        if not any(one.trains for one in self.judged):
            return []
        budget = BUDGETS[self.config.budget]
        sources = ", ".join(self.config.data.sources) or "State of the Union addresses"
        return [
            f"Budget {self.config.budget}: {budget.steps} steps, models {', '.join(budget.presets)}, seeds "
            f"{', '.join(map(str, budget.seeds))}; text: {sources}"
            f"{' and the Python sources of the standard library' if budget.corpora else ''}.",
            f"Learning rates: every recipe was tried with seed 0 at {', '.join(f'{f:g}' for f in budget.factors)} "
            "times its default, and its best one is used with the other seeds.",
            "Brackets hold 95 % intervals: Student's t over seeds, paired where two recipes are compared. A claim on a "
            "difference holds, or does not, where the interval leaves out zero; else it cannot be judged here.",
        ]

    def markdown(self, *, picture: bool) -> str:
        """The report as Markdown."""
        lines = ["# The papers' claims, measured", "", "<!-- Written by spectrim claims. -->", ""]
        lines += [f"{self.headline()}.", ""]
        if about := self.about():
            lines += [*about, ""]
        if picture:
            lines += ["![Differences of final loss with 95 % intervals](effects.svg)", ""]
        for title, rows in self.tables():
            lines += [f"## {title}", "", *markdown_table(rows, words=True), ""]
        lines += ["## Where", "", *(f"- {key}: {value}" for key, value in self.environment.items())]
        return "\n".join(lines) + "\n"

    def page(self, figure: Figure | None) -> PagePart:
        """The report as a page."""
        sections = [Section(title="Differences of final loss", items=[figure])] if figure else []
        for title, rows in self.tables():
            sections.append(Section(title=title, items=[Table(caption=title, rows=rows, words=True)]))
        where = [f"{key}: {value}" for key, value in self.environment.items()]
        sections.append(Section(title="Where", items=[Note(lines=where, bullets=True)]))
        return PagePart(
            title="The papers' claims",
            headline=self.headline(),
            summary=self.about(),
            swatches=(),
            sections=sections,
        )


def write_claims(
    judged: Sequence[Judged],
    rates: Sequence[Rates],
    config: ClaimsConfig,
    environment: Mapping[str, Any],
    folder: Path,
) -> None:
    """Write results.json, results.md, report.html and, if training was judged, effects.svg and .png.

    Claims and rates that an earlier call measured on the same runs stay in the report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    stored = earlier(config, file)
    known = {one.recipe: one for one in map(Rates.model_validate, stored.get("rates", ()))}
    known |= {one.recipe: one for one in rates}
    every = [known[recipe] for recipe in sorted(known)]
    report = Report(merged(judged, stored.get("claims", ())), every, config, environment)
    write_json(file, report.results())
    figure = effects_figure(report.judged)
    if figure:
        save_figure(figure, folder, "effects")
    write_text(folder / "results.md", report.markdown(picture=figure is not None))
    write_page([report.page(figure)], folder / "report.html")


def as_dict(one: Judged) -> dict[str, Any]:
    """A claim with its finding, as ``results.json`` has it."""
    return {**one.claim.model_dump(mode="json"), **one.finding.model_dump(mode="json")}


def earlier(config: ClaimsConfig, file: Path) -> dict[str, Any]:
    """The content of ``results.json`` from an earlier call; empty if that had other settings."""
    stored = parse_json(file.read_bytes(), repr(str(file))) if file.is_file() else {}
    same = {**stored.get("config", {}), "only": None} == {**config.model_dump(mode="json"), "only": None}
    return stored if same else {}


def merged(judged: Sequence[Judged], stored: Sequence[Mapping[str, Any]]) -> list[Judged]:
    """Claims judged now or earlier, in the order of the report; a new finding replaces a stored one."""
    found = {one.claim.name: one.finding for one in judged}
    for entry in stored:
        if entry["name"] not in found:
            found[entry["name"]] = Finding.model_validate({key: entry[key] for key in Finding.model_fields})
    return [Judged(claim, found[name]) for name, claim in all_claims().items() if name in found]


def row_of(one: Judged, config: ClaimsConfig) -> list[str]:
    """A claim's row, with the command that judges it again."""
    budget = f" --budget {config.budget}" if one.trains and config.budget != "default" else ""
    measured = f"{one.finding.measured} {one.finding.caveat}".strip()
    repeat = f"`spectrim claims{budget} --only {one.claim.name}`"
    return [one.claim.statement, one.claim.published, one.finding.verdict, measured, repeat]


def rates_row(one: Rates) -> list[str]:
    """A recipe's best rate, and the losses at all that were tried."""
    finite = {rate: loss for rate, loss in one.losses.items() if loss is not None}
    best = f"{min(finite, key=finite.__getitem__):.3g}" if finite else "none"
    tried = (
        f"{rate:.3g}: {'diverged' if loss is None else f'{loss:.4f}'}" for rate, loss in sorted(one.losses.items())
    )
    return [one.recipe, best, ", ".join(tried)]


def effects_figure(judged: Sequence[Judged]) -> Figure | None:
    """Differences of final loss as dots, with their intervals as lines; None without any."""
    found = [
        (one.claim.name, difference)
        for one in judged
        if isinstance(difference := one.finding.figures.get("difference"), Interval)
    ]
    if not found:
        return None
    traces: list[dict[str, Any]] = []
    for place, (name, interval) in enumerate(found):
        look = {"color": colour(0 if interval.high < 0 else 1 if interval.low > 0 else 6)}
        line = {**look, "width": 3}
        ends = {"x": [interval.low, interval.high], "y": [place, place], "mode": "lines", "line": line}
        dot = {"x": [interval.mean], "y": [place], "mode": "markers", "marker": {**look, "size": 9}}
        traces += [{"type": "scatter", "name": name, "showlegend": False, **drawn} for drawn in (ends, dot)]
    x = {"title": "difference of final loss (nats per token); left of zero is better"}
    y = {
        "title": "",
        "autorange": "reversed",
        "tickvals": list(range(len(found))),
        "ticktext": [name for name, _ in found],
    }
    rows = [["claim", "mean", "low", "high"]]
    rows += [[name, *(f"{value:+.4f}" for value in (each.mean, each.low, each.high))] for name, each in found]
    return Figure(
        title="Difference of final loss, with 95 % interval",
        alt="; ".join(f"{name}: {each.shown('+.4f')}" for name, each in found),
        drawing={"data": traces, "layout": layout(x=x, y=y)},
        numbers=Table(caption="Difference of final loss", rows=rows),
        height=120 + 28 * len(found),
    )
