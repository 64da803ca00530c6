"""The pictures of ``spectrim spectrum``: the figures of its page, most of them as grids of matrices."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spectrim.lab.logging.monitor_log import MonitoredRun, short_names
from spectrim.lab.reports.page.figures import colour, dash
from spectrim.lab.reports.page.html import Figure
from spectrim.lab.reports.page.training_spectra import spectrum_figure as staged_figure
from spectrim.lab.reports.pictures import Overlay, Trace, choice_panels, save_grid, save_rows
from spectrim.lab.reports.spectra.dot_figures import KINDS, spike_figures, structure_figures, weight_figures
from spectrim.lab.reports.spectra.spectrum_figures import (
    direction_figure,
    operator_figure,
    spectrum_figure,
    tail_figure,
)

__all__ = ["picture_names", "save_pictures"]

Summary = dict[str, Any]


def save_pictures(summary: Summary, folder: Path) -> None:
    """Write every picture with data into ``folder``, as PNG and as SVG; each subject has its own."""
    subjects = summary["subjects"]
    spectra = spectrum_figure(subjects)
    assert spectra is not None
    lines = {"tails": tail_figure(subjects), "operators": operator_figure(subjects)}
    directions = direction_figure(subjects)
    for index, (name, slug) in enumerate(picture_names(list(subjects)).items()):
        stem, title = f"{slug}-" if len(subjects) > 1 else "", describe(name, subjects)
        save_subject(subjects, index, spectra, folder, stem, title)
        known = {**line("relative variance", "#0072B2", "solid"), "mode": "lines+markers"}
        bound = {**line("at least: the mean is lost in noise", "#D55E00", "dot"), "mode": "lines+markers"}
        bounds: list[Overlay] = [((), index, known), ((), len(subjects) + index, bound)]
        grid(directions, bounds, folder, f"{stem}directions", f"Singular directions, {title}")
        for picture, figure in lines.items():
            if figure is not None:
                model = (index,) if len(subjects) > 1 else ()
                traces = [(model, place, trace) for place, trace in enumerate(figure.drawing["data"])]
                grid(figure, traces, folder, f"{stem}{picture}", f"{figure.title}, {title}")
        save_stages(subjects[name], folder, stem, title)
    weight = kinds_of(spectra).index("weight")
    weights = [((weight,), index, line(name, colour(index), dash(index))) for index, name in enumerate(subjects)]
    grid(spectra, weights, folder, "weights", "Singular values of the weights")
    save_rows(weight_figures(subjects), folder, "weight_norms", title="Norms of the weights")


def save_subject(subjects: Summary, index: int, spectra: Figure, folder: Path, stem: str, title: str) -> None:
    """The spectra of one subject, and what is drawn as rows of dots."""
    kinds, count = kinds_of(spectra), len(subjects)

    def of(*chosen: str) -> list[Overlay]:
        return [((kinds.index(kind),), index, line(*KINDS[kind])) for kind in chosen if kind in kinds]

    if "gradient" in kinds:
        shapes = of("gradient", "mean_gradient", "momentum", "weight")
        grid(spectra, shapes, folder, f"{stem}spectra", f"Singular spectra, {title}")
        floor = line("floor of the mean: noise alone", "#666666", "dash")
        noise = [*of("noise", "mean_gradient"), ((kinds.index("mean_gradient"),), count + index, floor)]
        grid(spectra, noise, folder, f"{stem}noise", f"Mean gradient and noise, {title}")
        for figures_of, name in ((spike_figures, "spikes"), (structure_figures, "structure")):
            save_rows(figures_of(subjects), folder, f"{stem}{name}", title=title, group=str(index))


def save_stages(subject: Summary, folder: Path, stem: str, title: str) -> None:
    """Spectra and the spike's share at every stage of training with exact spectra."""
    stages = [stage for stage in subject["stages"] if stage["matrices"]]
    records = [
        {"step": stage["step"], "spectra": {name: spectra_of(each) for name, each in stage["matrices"].items()}}
        for stage in stages
    ]
    figure = staged_figure([MonitoredRun(name="", index=0, records=records)])
    if figure is None or figure.choices is None:
        return
    kinds, steps = (figure.choices.controls[place].options for place in (1, 2))
    for kind in kinds:
        overlays = [
            ((kinds.index(kind), place), 0, line(step, shade, "solid"))
            for place, (step, shade) in enumerate(zip(steps, shades(len(steps)), strict=True))
        ]
        text = f"Spectra of the {kind} through training, {title}"
        grid(figure, overlays, folder, f"{stem}stages_{kind}", text)
    panels: dict[str, list[Trace]] = {}
    for name, short in short_names(dict.fromkeys(name for stage in stages for name in stage["matrices"])).items():
        for kind in kinds:
            held = [(stage["step"], stage["matrices"].get(name, {}).get(kind)) for stage in stages]
            known = [(step, spectrum["spike_share"]) for step, spectrum in held if spectrum]
            if known:
                x, y = zip(*known, strict=True)
                panels.setdefault(short, []).append({**line(*KINDS[kind]), "mode": "lines+markers", "x": x, "y": y})
    y_axis = {"title": {"text": "share of the energy"}, "range": [0, 1.04], "tickformat": ".0%"}
    text = f"The spike's share through training, {title}"
    save_grid(panels, folder, f"{stem}stage_shares", title=text, x={"title": {"text": "step"}}, y=y_axis)


def spectra_of(matrix: Summary) -> dict[str, list[float]]:
    return {kind: spectrum["spectrum"] for kind, spectrum in matrix.items()}


def shades(count: int) -> list[str]:
    """Colours from light to dark, without the faintest ones."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis_r"](0.12 + 0.88 * at / max(1, count - 1))) for at in range(count)]


def grid(figure: Figure | None, overlays: Sequence[Overlay], folder: Path, stem: str, title: str) -> None:
    """Draw curves of a figure with menus, one panel for every matrix."""
    if figure is not None:
        layout = figure.drawing["layout"]
        # Panels share an axis, so leave out the page's range and ticks, which belong to one matrix.
        y = {key: value for key, value in layout["yaxis"].items() if key not in ("range", "tickvals")} | {"type": "log"}
        x = {key: value for key, value in layout["xaxis"].items() if key != "range"}
        save_grid(choice_panels(figure, overlays), folder, stem, title=title, x=x, y=y)


def kinds_of(figure: Figure) -> list[str]:
    """The keys of the kinds that the second menu offers."""
    assert figure.choices is not None
    names = {name: key for key, (name, *_) in KINDS.items()}
    return [names[option] for option in figure.choices.controls[1].options]


def line(name: str, stroke: str, dash: str) -> Trace:
    return {"name": name, "mode": "lines", "line": {"color": stroke, "dash": dash, "width": 2}}


def describe(name: str, subjects: Summary) -> str:
    """A subject's name and its step of training."""
    step = subjects[name]["step"]
    return name if step is None or "step" in name else f"{name} at step {step:,}"


def picture_names(names: Sequence[str]) -> dict[str, str]:
    """Distinct parts of file names for the subjects."""
    found: dict[str, str] = {}
    for name in names:
        slug = re.sub(r"[^A-Za-z0-9+.-]+", "-", name).strip("-.") or "model"
        found[name] = slug if slug not in found.values() else f"{slug}-{len(found) + 1}"
    return found
