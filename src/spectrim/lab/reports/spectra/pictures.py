"""The pictures of ``spectrim spectrum``, PNG and SVG, most of them small multiples: a panel for each matrix."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from spectrim.lab.reports.plots import COLOURS, look, write_figure
from spectrim.lab.reports.spectra.panels import (
    INK,
    QUANTITIES,
    QUIET,
    Matrix,
    PanelGrid,
    Summary,
    describe,
    draw_grid,
    grid_of,
    log_axis,
)
from spectrim.lab.reports.spectra.row_pictures import norms_of_weights, row_size, rows_size, shares, structure

__all__ = ["OPERATOR_LOOKS", "TAIL_LOOKS", "picture_names", "save_pictures"]

BLUE, RED, GREEN, _, ORANGE, SKY, BLACK = COLOURS

OPERATOR_LOOKS = {
    "soft clip": (BLUE, "-"),
    "hard clip": (SKY, "--"),
    "shrink": (RED, "-"),
    "clamp": (ORANGE, "--"),
    "norm": ("#666666", ":"),
}

TAIL_LOOKS = {"gaussian": (SKY, "--"), "student": (RED, "-"), "contaminated": (GREEN, "-.")}

POINTS = 400
"""Of a spectrum that are drawn: more would only make files large."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture of one subject."""

    name: str
    size: Callable[[Summary], tuple[float, float] | None]
    """In inches; None where the subject has nothing to draw."""
    fill: Callable[..., None]
    """Called with the figure, and the subject with its name."""


def save_pictures(summary: Summary, folder: Path) -> None:
    """Write every picture there is something for into ``folder``, as PNG and as SVG."""
    subjects = summary["subjects"]
    slugs = picture_names(list(subjects))
    for name, subject in subjects.items():
        for picture in PICTURES:
            size = picture.size(subject)
            if size is not None:
                stem = f"{slugs[name]}-{picture.name}" if len(subjects) > 1 else picture.name
                save(folder, stem, partial(picture.fill, name=name, subject=subject), size)
    grid = common_grid(subjects)
    save(folder, "weights", lambda figure: weights(figure, subjects, grid), grid.size)
    rows = len(dict.fromkeys(each for subject in subjects.values() for each in subject["matrices"]))
    save(folder, "weight_norms", lambda figure: norms_of_weights(figure, subjects), rows_size(rows))


def save(folder: Path, stem: str, fill: Callable[[Any], None], size: tuple[float, float]) -> None:
    write_figure([folder / f"{stem}.png", folder / f"{stem}.svg"], fill, size=size)


def picture_names(names: Sequence[str]) -> dict[str, str]:
    """The names of subjects as parts of file names, each its own."""
    found: dict[str, str] = {}
    for name in names:
        slug = re.sub(r"[^A-Za-z0-9+.-]+", "-", name).strip("-.") or "model"
        found[name] = slug if slug not in found.values() else f"{slug}-{len(found) + 1}"
    return found


def handle(label: str, colour: Any, style: str = "-", **more: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, linestyle=style, label=label, **{"linewidth": 1.8, **more})


def ranks(values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Ranks from 1 with their values, thinned where there are many; those that are zero have no logarithm."""
    places = range(1, len(values) + 1)
    if len(values) > POINTS:
        places = sorted({round(len(values) ** (index / (POINTS - 1))) for index in range(POINTS)})  # type: ignore[assignment]
    top = max(values, default=0.0)
    shown = [place for place in places if values[place - 1] > 1e-9 * top]
    return shown, [values[place - 1] for place in shown]


def shade_spike(axes: Any, matrix: Matrix) -> None:
    axes.axvspan(0.8, matrix["spike_rank"] + 0.5, color="#f0e442", alpha=0.35, linewidth=0)


def spectra(figure: Any, name: str, subject: Summary) -> None:
    """Shapes of spectra: every one divided by its own Frobenius norm."""
    grid = grid_of(subject["matrices"], "gradient")
    assert grid is not None
    shown = ("gradient", "mean_gradient", "momentum", "weight")

    def draw(axes: Any, matrix: Matrix) -> None:
        shade_spike(axes, matrix)
        for key in shown:
            if matrix.get(key):
                places, values = ranks(matrix[key]["spectrum"])
                norm = sum(value**2 for value in matrix[key]["spectrum"]) ** 0.5
                _, colour, style = QUANTITIES[key]
                axes.loglog(places, [value / norm for value in values], color=colour, linestyle=style, linewidth=1.5)
        axes.set_ylim(2e-4, 1.3)
        log_axis(axes.yaxis)

    have = [key for key in shown if any(each.get(key) for each in subject["matrices"].values())]
    draw_grid(
        figure, grid, draw, title=f"Singular spectra, {describe(name, subject)}",
        x="rank of the singular value (shaded: the spike, the top 1.5 %)", y="singular value / Frobenius norm",
        legend=[handle(*QUANTITIES[key]) for key in have],
    )  # fmt: skip


def noise(figure: Any, name: str, subject: Summary) -> None:
    """Mean and noise in the same units, with what noise alone would give for the mean."""
    grid = grid_of(subject["matrices"], "noise")
    assert grid is not None
    batches = subject["text"]["batches"]

    def draw(axes: Any, matrix: Matrix) -> None:
        shade_spike(axes, matrix)
        unit = matrix["noise"]["energy"] ** 0.5
        curves = (
            (matrix["noise"]["spectrum"], RED, "-"),
            (matrix["mean_gradient"]["spectrum"], BLUE, "-"),
            (matrix["mean_gradient"]["floor"], QUIET, "--"),
        )
        for values, colour, style in curves:
            places, shown = ranks(values)
            axes.loglog(places, [value / unit for value in shown], color=colour, linestyle=style, linewidth=1.5)
        axes.set_ylim(3e-5, 2)
        log_axis(axes.yaxis)

    draw_grid(
        figure, grid, draw, title=f"Mean gradient and noise over {batches} batches, {describe(name, subject)}",
        x="rank of the singular value (shaded: the spike, the top 1.5 %)", y="singular value / (E‖N‖²)^½",
        legend=[
            handle("noise N of one batch", RED),
            handle(f"mean gradient over {batches} batches", BLUE),
            handle("its floor: noise alone", QUIET, "--"),
        ],
    )  # fmt: skip


def directions(figure: Any, name: str, subject: Summary) -> None:
    """Relative variance of singular directions; a bound from below where the mean is lost in noise."""
    grid = grid_of(subject["matrices"], "directions")
    assert grid is not None

    def draw(axes: Any, matrix: Matrix) -> None:
        shade_spike(axes, matrix)
        groups = matrix["directions"]
        centres = [(group["first"] * group["last"]) ** 0.5 for group in groups]
        known = [(x, group["relative"]) for x, group in zip(centres, groups, strict=True) if group["relative"]]
        bounds = [(x, group["at_least"]) for x, group in zip(centres, groups, strict=True) if group["at_least"]]
        if known:
            axes.plot(*zip(*known, strict=True), color=BLUE, marker="o", markersize=3.5, linewidth=1.4)
        if bounds:
            axes.plot(*zip(*bounds, strict=True), color=RED, marker="^", markersize=4.5, linestyle="", fillstyle="none")
        axes.axhline(1, color=QUIET, linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_yscale("log")
        log_axis(axes.yaxis)

    draw_grid(
        figure, grid, draw, title=f"Variance of singular directions over batches, {describe(name, subject)}",
        x="rank of the direction (shaded: the spike, the top 1.5 %)", y="variance / mean² of uᵀgv",
        legend=[
            handle("relative variance, groups of directions", BLUE, marker="o", markersize=4),
            handle("at least so much: the mean is lost in noise", RED, "", marker="^", fillstyle="none"),
        ],
    )  # fmt: skip


def tails(figure: Any, name: str, subject: Summary) -> None:
    """Density of noise entries and the three fits to it."""
    grid = grid_of(subject["matrices"], "tails")
    assert grid is not None
    lowest = min(value for matrix in grid.at.values() for value in matrix["tails"]["histogram"]["observed"] if value)

    highest = max(matrix["tails"]["histogram"]["size"][-1] for matrix in grid.at.values())

    def draw(axes: Any, matrix: Matrix) -> None:
        drawn = matrix["tails"]["histogram"]
        for model, (colour, style) in TAIL_LOOKS.items():
            axes.plot(drawn["size"], drawn[model], color=colour, linestyle=style, linewidth=1.4)
        axes.plot(
            drawn["size"], [value or float("nan") for value in drawn["observed"]], color=BLACK, marker=".",
            markersize=3, linestyle="", zorder=3,
        )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(lowest / 5, 5)
        axes.set_xlim(0.1, 1.2 * highest)
        axes.minorticks_off()
        log_axis(axes.yaxis)
        best = matrix["tails"]["fits"][0]
        words = f"best: {best['model']}"
        if "freedom" in best["parameters"]:
            words += f", ν = {best['parameters']['freedom']:.2g}"
        axes.text(0.98, 0.9, words, transform=axes.transAxes, ha="right", va="top", fontsize=7.5, color=INK)

    draw_grid(
        figure, grid, draw, title=f"Entries of the noise, {describe(name, subject)}",
        x="|N| / standard deviation", y="density",
        legend=[
            handle("entries", BLACK, "", marker="."),
            *(handle(f"{model} fit", *TAIL_LOOKS[model]) for model in TAIL_LOOKS),
        ],
    )  # fmt: skip


def operators(figure: Any, name: str, subject: Summary) -> None:
    """Signal squared over noise that operators leave, at equal energy left; a panel for each matrix."""
    grid = grid_of(subject["matrices"], "operators")
    assert grid is not None

    def draw(axes: Any, matrix: Matrix) -> None:
        for operator, (colour, style) in OPERATOR_LOOKS.items():
            points = [(each["energy"], each["gain"]) for each in matrix["operators"] if each["operator"] == operator]
            known = [(1.0, 1.0), *((x, y) for x, y in points if y and y > 0)]
            axes.plot(
                *zip(*known, strict=True), color=colour, linestyle=style, marker="o", markersize=2.5, linewidth=1.4
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.invert_xaxis()
        axes.set_ylim(0.01, 3)
        axes.set_xticks([1, 0.5, 0.2, 0.05], labels=["100", "50", "20", "5"])
        axes.minorticks_off()
        axes.set_yticks([0.01, 0.1, 1], labels=["0.01", "0.1", "1"])

    labels = {"shrink": "entries shrunk", "clamp": "entries clamped", "norm": "norm bounded"}
    draw_grid(
        figure, grid, draw, title=f"What clipping and shrinking leave, {describe(name, subject)}",
        x="energy left (%), from weak to strong", y="signal² / noise left (1: as scaling does)",
        legend=[handle(labels.get(key, f"spectral {key}"), *shape) for key, shape in OPERATOR_LOOKS.items()],
    )  # fmt: skip


def stages(kind: str) -> Callable[[Any, str, Summary], None]:
    """Spectra of one kind at every stage of training that the run's monitor took them at."""

    def fill(figure: Any, name: str, subject: Summary) -> None:
        from matplotlib import colormaps

        steps = [stage["step"] for stage in staged(subject, kind)]
        # From light to dark, but never too faint for a line.
        colours = {
            step: colormaps["viridis_r"](0.12 + 0.88 * index / max(1, len(steps) - 1))
            for index, step in enumerate(steps)
        }
        having = {key: each for key, each in subject["matrices"].items() if of_stage(subject, key, kind)}

        def draw(axes: Any, matrix: Matrix) -> None:
            shade_spike(axes, matrix)
            key = next(name for name, each in having.items() if each is matrix)
            for step, spectrum in of_stage(subject, key, kind):
                norm = sum(value**2 for value in spectrum) ** 0.5
                places, values = ranks(spectrum)
                axes.loglog(places, [value / norm for value in values], color=colours[step], linewidth=1.3)
            axes.set_ylim(2e-4, 1.3)
            log_axis(axes.yaxis)

        draw_grid(
            figure, PanelGrid(having), draw, title=f"Spectra of the {kind} through training, {describe(name, subject)}",
            x="rank of the singular value (shaded: the spike, the top 1.5 %)", y="singular value / Frobenius norm",
            legend=[handle(f"step {step:,}", colours[step]) for step in steps],
        )  # fmt: skip

    return fill


def stage_shares(figure: Any, name: str, subject: Summary) -> None:
    """The spike's share of the energy at every stage, gradient and momentum."""
    having = {key: each for key, each in subject["matrices"].items() if of_stage(subject, key, "gradient")}

    def draw(axes: Any, matrix: Matrix) -> None:
        key = next(name for name, each in having.items() if each is matrix)
        for kind in ("gradient", "momentum"):
            points = [
                (stage["step"], stage["matrices"][key][kind]["spike_share"])
                for stage in staged(subject, kind)
                if kind in stage["matrices"].get(key, {})
            ]
            if points:
                _, colour, style = QUANTITIES[kind]
                axes.plot(
                    *zip(*points, strict=True), color=colour, linestyle=style, marker="o", markersize=3, linewidth=1.4
                )
        axes.set_ylim(0, 1.04)  # a share of 1 is still seen whole

    draw_grid(
        figure, PanelGrid(having), draw, title=f"The spike's share through training, {describe(name, subject)}",
        x="step", y="share of the energy in the top 1.5 %",
        legend=[handle(*QUANTITIES["gradient"]), handle(*QUANTITIES["momentum"])],
    )  # fmt: skip


def weights(figure: Any, subjects: Summary, grid: PanelGrid) -> None:
    """Weight spectra of all subjects, laid over each other."""
    every = [each for subject in subjects.values() for each in subject["matrices"].values()]
    highest = max(each["weight"]["spectral_norm"] for each in every) or 1.0

    def draw(axes: Any, matrix: Matrix) -> None:
        for index, subject in enumerate(subjects.values()):
            for other in subject["matrices"].values():
                if (other["kind"], other["layer"]) == (matrix["kind"], matrix["layer"]):
                    places, values = ranks(other["weight"]["spectrum"])
                    shape = look(index)
                    axes.loglog(places, values, color=shape["color"], linestyle=shape["linestyle"], linewidth=1.5)
        # The last singular values of a square matrix are small by chance, and would press the rest together.
        axes.set_ylim(1e-3 * highest, 1.6 * highest)
        log_axis(axes.yaxis)

    draw_grid(
        figure, grid, draw, title="Singular values of the weights", x="rank of the singular value", y="singular value",
        legend=[
            handle(name, look(index)["color"], look(index)["linestyle"]) for index, name in enumerate(subjects)
        ],
    )  # fmt: skip


def common_grid(subjects: Summary) -> PanelGrid:
    return PanelGrid(
        {f"{name} {key}": each for name, subject in subjects.items() for key, each in subject["matrices"].items()}
    )


def staged(subject: Summary, kind: str) -> list[Summary]:
    """The stages at which a kind of spectrum was taken."""
    return [stage for stage in subject["stages"] if any(kind in each for each in stage["matrices"].values())]


def of_stage(subject: Summary, matrix: str, kind: str) -> list[tuple[int, list[float]]]:
    """Steps and spectra of one matrix."""
    return [
        (stage["step"], stage["matrices"][matrix][kind]["spectrum"])
        for stage in staged(subject, kind)
        if kind in stage["matrices"].get(matrix, {})
    ]


def grid_size(key: str) -> Callable[[Summary], tuple[float, float] | None]:
    def size(subject: Summary) -> tuple[float, float] | None:
        grid = grid_of(subject["matrices"], key)
        return grid.size if grid else None

    return size


def stage_size(kind: str) -> Callable[[Summary], tuple[float, float] | None]:
    def size(subject: Summary) -> tuple[float, float] | None:
        having = {key: each for key, each in subject["matrices"].items() if of_stage(subject, key, kind)}
        return PanelGrid(having).size if having else None

    return size


PICTURES = (
    Picture(name="spikes", size=row_size, fill=shares),
    Picture(name="spectra", size=grid_size("gradient"), fill=spectra),
    Picture(name="directions", size=grid_size("directions"), fill=directions),
    Picture(name="noise", size=grid_size("noise"), fill=noise),
    Picture(name="structure", size=row_size, fill=structure),
    Picture(name="tails", size=grid_size("tails"), fill=tails),
    Picture(name="operators", size=grid_size("operators"), fill=operators),
    Picture(name="stages_gradient", size=stage_size("gradient"), fill=stages("gradient")),
    Picture(name="stages_momentum", size=stage_size("momentum"), fill=stages("momentum")),
    Picture(name="stage_shares", size=stage_size("gradient"), fill=stage_shares),
)
