"""Panels of small multiples: a matrix each, one row for a kind of matrix and one column for a layer."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from spectrim.lab.reports.plots import COLOURS

__all__ = [
    "INK",
    "QUANTITIES",
    "QUIET",
    "Matrix",
    "PanelGrid",
    "Summary",
    "describe",
    "draw_grid",
    "grid_of",
    "log_axis",
    "measured",
    "place_of",
]

BLUE, RED, GREEN, PINK, ORANGE, _, _ = COLOURS

QUANTITIES = {
    "gradient": ("gradient of one batch", RED, "-"),
    "mean_gradient": ("mean gradient G", BLUE, "-"),
    "noise": ("noise N = g − G", ORANGE, "--"),
    "momentum": ("momentum", GREEN, "-."),
    "weight": ("weights", PINK, ":"),
}
"""What has a spectrum: its name, colour and dashes."""

MOST_ROWS, MOST_COLUMNS = 14, 4
"""Of a picture; what does not fit is in the numbers alone."""

PANEL = (2.35, 1.35)
"""Width and height of a panel, in inches."""

INK = "#333333"
QUIET = "#666666"

Summary = dict[str, Any]
Matrix = dict[str, Any]


class PanelGrid:
    """Matrices by kind and layer, in the model's order."""

    def __init__(self, matrices: Mapping[str, Matrix]) -> None:
        kinds = list(dict.fromkeys(each["kind"] for each in matrices.values()))
        layers = list(dict.fromkeys(each["layer"] for each in matrices.values()))
        self.kinds, self.layers = kinds[:MOST_ROWS], layers[:MOST_COLUMNS]
        self.left_out = sum(
            each["kind"] not in self.kinds or each["layer"] not in self.layers for each in matrices.values()
        )
        self.at = {(each["kind"], each["layer"]): each for each in matrices.values()}

    @property
    def size(self) -> tuple[float, float]:
        """Of the picture, in inches."""
        width = max(6.0, 0.7 + PANEL[0] * len(self.layers))
        return width, 1.5 + PANEL[1] * len(self.kinds)


def grid_of(matrices: Mapping[str, Matrix], having: str) -> PanelGrid | None:
    """The grid of the matrices of which this was measured; None where there is none."""
    found = {name: each for name, each in matrices.items() if each.get(having)}
    return PanelGrid(found) if found else None


def draw_grid(
    figure: Any,
    grid: PanelGrid,
    draw: Callable[[Any, Matrix], None],
    *,
    title: str,
    x: str,
    y: str,
    legend: Iterable[Any] = (),
    share_y: bool | str = True,
) -> None:
    """Let ``draw`` fill a panel for every matrix; axes are labelled at the edges, and there is one legend."""
    panels = figure.subplots(len(grid.kinds), len(grid.layers), sharex=True, sharey=share_y, squeeze=False)
    for row, kind in enumerate(grid.kinds):
        for column, layer in enumerate(grid.layers):
            axes = panels[row][column]
            matrix = grid.at.get((kind, layer))
            if matrix is None:
                axes.axis("off")
                continue
            draw(axes, matrix)
            axes.tick_params(labelsize=8, colors=INK)
            axes.grid(color="0.92", linewidth=0.6)
            axes.set_axisbelow(True)
            if (
                axes.get_xscale() == "log"
                and axes.xaxis.get_major_formatter().__class__.__name__ == "LogFormatterSciNotation"
            ):
                axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            if column == 0:
                axes.set_ylabel(label_of(kind), fontsize=8.5, color=INK)
            if row == 0 and layer is not None:
                axes.set_title(f"layer {layer}", fontsize=10, color=INK)
    figure.supxlabel(x, fontsize=9.5, color=INK)
    figure.supylabel(y, fontsize=9.5, color=INK)
    # One legend whose title is the picture's, so that the two cannot lie over each other.
    handles = list(legend)
    columns = max(
        1, min(4 if len(handles) % 4 in (0, 3) or len(handles) > 8 else 3, len(handles), len(grid.layers) + 1)
    )
    figure.legend(
        handles=handles, title=title, title_fontsize=11, alignment="left", loc="outside upper left", ncols=columns,
        frameon=False, fontsize=9, handlelength=2.2, columnspacing=1.6,
    )  # fmt: skip


def label_of(kind: str) -> str:
    """A kind's name on two lines where it has parts, so that it fits beside a panel."""
    head, dot, tail = kind.rpartition(".")
    return f"{head}\n{tail}" if dot and len(kind) > 12 else kind


def log_axis(axis: Any, *, few: bool = True) -> None:
    """A logarithmic axis with a label at every power of ten that there is room for, and none between."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(numticks=4 if few else 8))
    axis.set_minor_formatter(NullFormatter())


def describe(name: str, subject: Summary) -> str:
    """A subject and where in its training it is."""
    step = subject["step"]
    return name if step is None or "step" in name else f"{name} at step {step:,}"


def measured(subject: Summary) -> dict[str, Matrix]:
    """The matrices whose gradients were measured."""
    return {name: each for name, each in subject["matrices"].items() if each.get("gradient")}


def place_of(matrix: Matrix) -> str:
    """The layer and the kind of a matrix."""
    return str(matrix["kind"] if matrix["layer"] is None else f"{matrix['layer']}: {matrix['kind']}")
