"""The pictures hold what the description of the figure says, which the page is drawn from too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure as Picture

from report_results import entry, results
from spectrim.lab.reports import pictures
from spectrim.lab.reports.page.comparison_page import write_report
from spectrim.lab.reports.page.html import Control, Figure, Frame, Menus, Table
from spectrim.lab.reports.page.loss_figure import loss_figure


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Picture]:
    """Every picture that is written, by its stem, before it becomes a file."""
    found: dict[str, Picture] = {}

    def keep(folder: Path, stem: str, fill: Callable[[Any], None], size: tuple[float, float]) -> None:
        found[stem] = Picture(figsize=size)
        fill(found[stem])

    monkeypatch.setattr(pictures, "write", keep)
    return found


def figure(**more: Any) -> Figure:
    axes = {"xaxis": {"title": {"text": "rank"}, "type": "log"}, "yaxis": {"title": {"text": "value"}}}
    drawing = {"data": [], "layout": axes}
    return Figure(**{"title": "t", "alt": "a", "drawing": drawing, "numbers": Table(caption="c", rows=[]), **more})


def test_the_loss_is_drawn_as_on_the_page(drawn: dict[str, Picture], tmp_path: Path) -> None:
    seeds = {str(seed): {"curve": {"tokens": [100, 200], "val_loss": [5.0 + seed, 4.0 + seed]}} for seed in (0, 1)}
    recipes = {"adamw": entry([5.5, 4.5], seeds=seeds), "muon": entry([5.0, 3.5]), "spectra": entry([5.0, None])}
    summary = results(recipes)
    write_report(summary, tmp_path)
    axes = drawn["loss"].axes[0]
    lines = [trace for trace in loss_figure(summary, over="tokens").drawing["data"] if trace.get("fill") is None]
    assert [list(line.get_xdata()) for line in axes.lines] == [list(trace["x"]) for trace in lines]
    assert [line.get_color() for line in axes.lines] == [trace["line"]["color"] for trace in lines]
    assert list(axes.lines[0].get_ydata()) == [5.5, 4.5]
    assert len(axes.patches) == 1, "the band of the seeds"
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["muon  3.500", "adamw  4.500", "spectra  diverged", "AdamW's final loss"]
    assert list(drawn) == ["loss"], "without times there is no second picture"


def test_a_menu_becomes_a_grid_with_a_panel_for_every_matrix(drawn: dict[str, Picture], tmp_path: Path) -> None:
    options = ["layer 0 · up", "layer 1 · up", "layer 1 · down", "head"]
    kinds = Control(label="Spectrum of", options=["gradient", "weight"])
    frames = {
        (place, kind): Frame(curves=[([1, 2], [place + 1.0, 0.5]), None], axis={})
        for place in range(4)
        for kind in (0, 1)
    }
    menus = Menus(controls=[Control(label="Matrix", options=options), kinds], frames=frames, tabled=1)
    look = {"mode": "lines", "line": {"color": "#0072B2"}, "name": "gradient"}
    panels = pictures.choice_panels(figure(choices=menus), [((0,), 0, look), ((0,), 1, look)])
    assert list(panels) == options
    layout = figure().drawing["layout"]
    pictures.save_grid(panels, tmp_path, "grid", title="Spectra", x=layout["xaxis"], y=layout["yaxis"])
    axes = drawn["grid"].axes
    assert len(axes) == 3 * 3, "kinds up, down and head; layers 0, 1 and none"
    first = {panel.lines[0].get_ydata()[0] for panel in axes if panel.lines}
    assert first == {1.0, 2.0, 3.0, 4.0}
    assert all(panel.get_xscale() == "log" for panel in axes if panel.lines)
    assert [text.get_text() for text in drawn["grid"].legends[0].get_texts()] == ["gradient"]
    pictures.save_grid({}, tmp_path, "none", title="", x={}, y={})
    assert "none" not in drawn


def test_dots_of_one_subject_have_a_row_for_every_matrix(drawn: dict[str, Picture], tmp_path: Path) -> None:
    traces = [
        {"x": [0.5], "y": ["down"], "mode": "markers", "name": "a: left", "legendgroup": "0", "marker": {"size": 9}},
        {"x": [0.1, 0.2], "y": ["up", "down"], "mode": "markers", "name": "b: left", "legendgroup": "1"},
        {"x": [0.3, 0.3], "y": ["up", "down"], "mode": "markers", "name": "by chance"},
    ]
    axis = {"title": {"text": "share"}, "tickformat": ".0%", "range": [0, 1], "autorange": "reversed"}
    dots = figure(drawing={"data": traces, "layout": {"xaxis": axis}})
    pictures.save_rows([dots], tmp_path, "rows", title="all", group="0")
    [axes] = drawn["rows"].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["down", "up"]
    assert [list(line.get_ydata()) for line in axes.lines] == [[0], [1, 0]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["left", "by chance"]
    assert axes.get_xlim() == (1, 0)


def test_equal_figures_are_equal_files(tmp_path: Path) -> None:
    made = loss_figure(results({"adamw": entry([5.0, 4.0])}), over="tokens")
    for folder in ("one", "two"):
        pictures.save_figure(made, tmp_path / folder, "loss")
    for name in ("loss.png", "loss.svg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
