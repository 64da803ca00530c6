"""The report on claims: JSON, a Markdown page, an HTML page, and a picture of every effect with its interval."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spectrim.lab.claims.catalogue import CHECKS, Judged, Rates, all_claims
from spectrim.lab.claims.claim import Finding, Interval
from spectrim.lab.claims.settings import BUDGETS, ClaimsConfig
from spectrim.lab.files import parse_json, write_json, write_text
from spectrim.lab.reports.page.figures import colour, layout
from spectrim.lab.reports.page.html import Figure, Note, PagePart, Section, Table, write_page
from spectrim.lab.reports.pictures import save_figure
from spectrim.lab.tables import markdown_table

__all__ = ["as_dict", "rows_of", "write_claims"]

PAPERS = {
    "2603.14315": "SPECTRA: spectral clipping (arXiv 2603.14315)",
    "2602.11185": "Spectra: the spike-aware optimizer (arXiv 2602.11185)",
    "2605.27733": "Entry-wise shrinkage (arXiv 2605.27733)",
    "none": "Mixtures that nobody has published",
}

HEADER = ("claim", "paper says", "verdict", "measured here", "repeat")

VERDICTS = ("holds", "does not hold", "cannot be judged")


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
    judged = merged(judged, stored.get("claims", ()))
    known = {one.recipe: one for one in map(Rates.model_validate, stored.get("rates", ()))}
    rates = sorted((known | {one.recipe: one for one in rates}).values(), key=lambda one: one.recipe)
    written = {
        "kind": "claims",
        "config": config.model_dump(mode="json"),
        "environment": dict(environment),
        "claims": [as_dict(one) for one in judged],
        "rates": [one.model_dump(mode="json") for one in rates],
    }
    write_json(file, written)
    figure = effects_figure(judged)
    if figure:
        save_figure(figure, folder, "effects")
    write_text(folder / "results.md", markdown(judged, rates, config, environment, picture=figure is not None))
    write_page([page(judged, rates, config, environment, figure)], folder / "report.html")


def as_dict(one: Judged) -> dict[str, Any]:
    """A claim with its finding, as ``results.json`` has it."""
    return {**one.claim.model_dump(mode="json"), **one.finding.model_dump(mode="json")}


def earlier(config: ClaimsConfig, file: Path) -> dict[str, Any]:
    """What ``results.json`` holds from an earlier call; nothing if it had other settings."""
    stored = parse_json(file.read_bytes(), repr(str(file))) if file.is_file() else {}
    same = {**stored.get("config", {}), "only": None} == {**config.model_dump(mode="json"), "only": None}
    return stored if same else {}


def merged(judged: Sequence[Judged], stored: Sequence[Mapping[str, Any]]) -> list[Judged]:
    """The claims just judged, and the stored ones that were not, in the order of the report."""
    found = {one.claim: one for one in judged}
    findings = {entry["name"]: {key: entry[key] for key in Finding.model_fields} for entry in stored}
    for claim in all_claims().values():
        if claim not in found and claim.name in findings:
            found[claim] = Judged(claim, CHECKS[claim.name], Finding.model_validate(findings[claim.name]))
    return [found[claim] for claim in all_claims().values() if claim in found]


def command(name: str, config: ClaimsConfig, trains: bool) -> str:
    """The command that judges one claim again."""
    budget = f" --budget {config.budget}" if trains and config.budget != "default" else ""
    return f"spectrim claims{budget} --only {name}"


def rows_of(judged: Sequence[Judged], config: ClaimsConfig, paper: str) -> list[list[str]]:
    """The table of one paper's claims, its header first; empty if none was judged."""
    rows = []
    for one in judged:
        if one.claim.paper == paper:
            measured = f"{one.finding.measured} {one.finding.caveat}".strip()
            repeat = f"`{command(one.claim.name, config, bool(one.check.needs))}`"
            rows.append([one.claim.statement, one.claim.published, one.finding.verdict, measured, repeat])
    return [list(HEADER), *rows] if rows else []


def headline(judged: Sequence[Judged]) -> str:
    """How many claims got which verdict."""
    counts = {verdict: sum(one.finding.verdict == verdict for one in judged) for verdict in VERDICTS}
    return f"{len(judged)} claims: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


def about(config: ClaimsConfig) -> list[str]:
    """How the runs were made, in sentences."""
    budget = BUDGETS[config.budget]
    sources = ", ".join(config.data.sources) or "State of the Union addresses"
    return [
        f"Budget {config.budget}: {budget.steps} steps, models {', '.join(budget.presets)}, seeds "
        f"{', '.join(map(str, budget.seeds))}; text: {sources}"
        f"{' and the Python sources of the standard library' if budget.corpora else ''}.",
        f"Learning rates: every recipe was tried with seed 0 at {', '.join(f'{f:g}' for f in budget.factors)} times "
        "its default, and its best one is used with the other seeds.",
        "Brackets hold 95 % intervals: Student's t over seeds, paired where two recipes are compared. A claim on a "
        "difference holds, or does not, where the interval leaves out zero; else it cannot be judged here.",
    ]


def rates_table(rates: Sequence[Rates]) -> list[list[str]]:
    """The table of learning rates and losses, its header first."""
    return [["recipe", "best", "learning rate: loss"], *map(rates_row, rates)]


def rates_row(one: Rates) -> list[str]:
    """A recipe's best rate, and the losses at all that were tried."""
    finite = {rate: loss for rate, loss in one.losses.items() if loss is not None}
    best = f"{min(finite, key=finite.__getitem__):.3g}" if finite else "none"
    tried = (
        f"{rate:.3g}: {'diverged' if loss is None else f'{loss:.4f}'}" for rate, loss in sorted(one.losses.items())
    )
    return [one.recipe, best, ", ".join(tried)]


def markdown(
    judged: Sequence[Judged],
    rates: Sequence[Rates],
    config: ClaimsConfig,
    environment: Mapping[str, Any],
    *,
    picture: bool,
) -> str:
    """The report as Markdown."""
    lines = [
        "# The papers' claims, measured",
        "",
        "<!-- Written by spectrim claims. -->",
        "",
        f"{headline(judged)}.",
        "",
    ]
    lines += [*about(config), ""] if any(one.check.needs for one in judged) else []
    if picture:
        lines += ["![Differences of final loss with 95 % intervals](effects.svg)", ""]
    for paper, title in PAPERS.items():
        if rows := rows_of(judged, config, paper):
            lines += [f"## {title}", "", *markdown_table(rows, words=True), ""]
    if rates:
        lines += ["## Learning rates that were tried", "", *markdown_table(rates_table(rates), words=True), ""]
    lines += ["## Where", "", *(f"- {key}: {value}" for key, value in environment.items())]
    return "\n".join(lines) + "\n"


def page(
    judged: Sequence[Judged],
    rates: Sequence[Rates],
    config: ClaimsConfig,
    environment: Mapping[str, Any],
    figure: Figure | None,
) -> PagePart:
    """The report as a page."""
    sections = [Section(title="Differences of final loss", items=[figure])] if figure else []
    for paper, title in PAPERS.items():
        if rows := rows_of(judged, config, paper):
            sections.append(Section(title=title, items=[Table(caption=title, rows=rows, words=True)]))
    if rates:
        caption = "Learning rates that were tried"
        sections.append(Section(title=caption, items=[Table(caption=caption, rows=rates_table(rates), words=True)]))
    where = [f"{key}: {value}" for key, value in environment.items()]
    sections.append(Section(title="Where", items=[Note(lines=where, bullets=True)]))
    summary = about(config) if any(one.check.needs for one in judged) else []
    return PagePart(
        title="The papers' claims", headline=headline(judged), summary=summary, swatches=(), sections=sections
    )


def effects(judged: Sequence[Judged]) -> Iterator[tuple[str, Interval]]:
    """Every claim that is judged by one difference of final losses."""
    for one in judged:
        if isinstance(difference := one.finding.figures.get("difference"), Interval):
            yield one.claim.name, difference


def effects_figure(judged: Sequence[Judged]) -> Figure | None:
    """Differences of final loss as dots, with their intervals as lines; None without any."""
    found = list(effects(judged))
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
