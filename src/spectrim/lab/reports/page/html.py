"""A report page: one HTML file with its figures, tables, styles and scripts.

A page is plain data (:class:`PagePart`, made of :class:`Section`); only this module knows HTML. The template escapes
every text. The page's content security policy allows no request, and no script but its own.
"""

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import unescape
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

from spectrim.lab.files import finite, write_text

__all__ = [
    "DASHES",
    "MARK",
    "Control",
    "Figure",
    "Frame",
    "Listing",
    "Menus",
    "Note",
    "PagePart",
    "Section",
    "Swatch",
    "Table",
    "render",
    "write_page",
]

MARK = '<meta name="generator" content="spectrim report">'
"""Marks pages that spectrim wrote, which it may overwrite."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under a header; their first cells name them."""

    kind: ClassVar[str] = "table"
    caption: str
    rows: Sequence[Sequence[str]]
    """The header first."""
    words: bool = False
    """True if cells hold words and are aligned to the left."""
    folded: bool = False
    """True if the table is collapsed at first."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """A menu or a slider that chooses what a figure shows."""

    label: str
    options: Sequence[str]
    start: int = 0
    """The option that is shown at first. Print shows a menu's current option and a slider's last one."""
    slider: bool = False


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What a figure shows at one choice of its controls."""

    curves: Sequence[tuple[Sequence[float], Sequence[float | None]] | None]
    """Horizontal and vertical values of every trace; None for a trace without data here."""
    axis: Mapping[str, Any]
    """Settings of plotly's vertical axis by dotted keys, the same keys in every frame of a figure."""


@dataclass(frozen=True, kw_only=True)
class Menus:
    """The controls of a figure, and a frame for every choice."""

    controls: Sequence[Control]
    frames: Mapping[tuple[int, ...], Frame]
    """Frames by the index of every control's option; a missing one was not measured."""
    tabled: int
    """The number of traces, from the first, that the table shows."""

    @property
    def start(self) -> tuple[int, ...]:
        """The first choice: an option of every control."""
        return tuple(control.start for control in self.controls)

    @property
    def words(self) -> str:
        """The first choice in words."""
        return ", ".join(control.options[control.start] for control in self.controls)

    def packed(self) -> dict[str, Any]:
        """The data for the page's script; values and axes that frames share are stored once."""
        places: dict[tuple[float, ...], int] = {}
        axes: dict[str, int] = {}
        frames = {
            "-".join(map(str, key)): {
                "axis": axes.setdefault(json.dumps(finite(dict(frame.axis))), len(axes)),
                "curves": [
                    curve and [places.setdefault(tuple(curve[0]), len(places)), curve[1]] for curve in frame.curves
                ],
            }
            for key, frame in self.frames.items()
        }
        return {
            "options": [control.options for control in self.controls],
            "frames": frames,
            "places": list(places),
            "axes": [json.loads(axis) for axis in axes],
            "tabled": self.tabled,
        }


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing of plotly, its description and its numbers.

    Attributes:
        drawing: "data" and "layout" as plotly has them. The ``legendgroup`` of a trace is the place of its recipe in
            the part, so that hiding the recipe hides it.
        alt: describes it to screen readers.
        scales: axes ("x", "y") that a reader may turn logarithmic.
        close_up: the range of losses that is shown at first, if not all.
        choices: menus and sliders; drawing and numbers are those of the first choice.
        small: two such figures stand side by side if there is room.
    """

    kind: ClassVar[str] = "figure"
    title: str
    alt: str
    drawing: dict[str, Any]
    numbers: Table
    note: str = ""
    scales: tuple[str, ...] = ()
    close_up: tuple[float, float] | None = None
    choices: Menus | None = None
    small: bool = False
    height: int = 420

    @property
    def legend(self) -> list["Swatch"]:
        """Entries for the figure's lines, one for each name, and for dots if there are lines too."""
        found: dict[str, Swatch] = {}
        traces = [trace for trace in self.drawing["data"] if trace["type"] == "scatter" and "fill" not in trace]
        for trace in traces if any(trace["mode"] != "markers" for trace in traces) else ():
            line = trace.get("line") or trace["marker"]
            swatch = Swatch(
                recipe=unescape(trace["name"]),
                colour=line["color"],
                dashes=DASHES[line.get("dash", "dots")],
                group=trace.get("legendgroup", ""),
            )
            found.setdefault(swatch.recipe, swatch)
        return list(found.values())


@dataclass(frozen=True, kw_only=True)
class Note:
    """Lines of text, or a list with ``bullets``. Text in `backticks` is code."""

    kind: ClassVar[str] = "note"
    lines: Sequence[str]
    bullets: bool = False


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Text to copy: a command, or a file."""

    kind: ClassVar[str] = "listing"
    title: str
    text: str
    file_name: str = ""
    """The file's name when it is saved."""
    folded: bool = False

    @property
    def address(self) -> str:
        """A data: link that saves the text."""
        return "data:text/plain;charset=utf-8;base64," + base64.b64encode(self.text.encode()).decode()


@dataclass(frozen=True, kw_only=True)
class Section:
    """A titled part of a study's report."""

    title: str
    items: Sequence[Table | Figure | Note | Listing]


DASHES = {
    "solid": "",
    "dash": "8 4",
    "dashdot": "8 3 2 3",
    "longdash": "14 4",
    "longdashdot": "14 3 2 3",
    "dot": "2 3",
    "dots": "0 8",
}
"""SVG's ``stroke-dasharray`` for plotly's dashes, and for dots without a line."""


@dataclass(frozen=True, kw_only=True)
class Swatch:
    """How a recipe is drawn: an entry of a legend, and of the switches that hide it."""

    recipe: str
    colour: str
    dashes: str
    """SVG's ``stroke-dasharray``; empty for a solid line."""
    group: str = ""
    """The ``legendgroup`` of its traces."""


@dataclass(frozen=True, kw_only=True)
class PagePart:
    """A study on the page."""

    title: str
    headline: str
    summary: Sequence[str]
    """Sentences below the headline."""
    swatches: Sequence[Swatch]
    sections: Sequence[Section] = field(default=())


def render(parts: Sequence[PagePart]) -> str:
    """The page, as HTML that needs nothing else."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(resource), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.undefined = jinja2.StrictUndefined
    environment.filters |= {"code": code, "breakable": breakable}
    (plotly, packed_plotly), own = plotly_script(), resource("page.js")
    figures = {
        address(index, section_index, item_index): item
        for index, part in enumerate(parts)
        for section_index, section in enumerate(part.sections)
        for item_index, item in enumerate(section.items)
        if isinstance(item, Figure)
    }
    drawings = {
        key: {
            **figure.drawing,
            "closeUp": figure.close_up,
            "height": figure.height,
            "choices": figure.choices and figure.choices.packed(),
        }
        for key, figure in figures.items()
    }
    title = parts[0].title if len(parts) == 1 else f"{len(parts)} studies: {', '.join(part.title for part in parts)}"
    return environment.get_template("page.html.j2").render(
        mark=Markup(MARK),
        title=title,
        parts=parts,
        address=address,
        policy=policy([plotly, own]),
        style=Markup(resource("page.css")),
        plotly=packed_plotly,
        script=Markup(own),
        drawings=packed(json.dumps(finite(drawings), allow_nan=False, separators=(",", ":"))),
    )


@cache
def plotly_script() -> tuple[str, str]:
    """The source of plotly, plain and packed."""
    from plotly.offline import get_plotlyjs

    script: str = get_plotlyjs()
    return script, packed(script)


def packed(text: str) -> str:
    """Compress a text to base64; the page's script unpacks it."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def write_page(parts: Sequence[PagePart], path: Path) -> None:
    """Write the page, whole or not at all."""
    write_text(path, render(parts))


def address(*places: int) -> str:
    """The id of a part, of a section of it, or of an item of that."""
    return "-".join(["part", *map(str, places)])


def policy(scripts: Sequence[str]) -> str:
    """A content security policy: no request, and no script but these.

    Plotly sets styles of elements, and makes pictures of figures in memory.
    """
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts
    )
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'"


def resource(name: str) -> str:
    return (resources.files("spectrim.lab.reports.page") / name).read_text(encoding="utf-8")


def code(text: str) -> Any:
    """Escape a text, and mark `backticks` as code."""
    from markupsafe import Markup, escape

    pieces = re.split(r"`([^`]*)`", text)
    return Markup("").join(
        Markup("<code>{}</code>").format(piece) if index % 2 else escape(piece) for index, piece in enumerate(pieces)
    )


def breakable(name: str) -> Any:
    """Escape a name, and allow line breaks between its parts."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(piece) for piece in re.split(r"(?<=[.:/])", name))
