"""Spectra through training on a report page: the monitors' records of several runs, with a slider over time. A run is a
:class:`spectrim.lab.logging.monitor_log.MonitoredRun`. Runs without a monitor have no section.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from spectrim.lab.logging.monitor_log import MonitoredRun, MonitorRecord, layer_of, short_names
from spectrim.lab.reports.page.figures import layout
from spectrim.lab.reports.page.html import Control, Figure, Frame, Menus, Note, Section, Table
from spectrim.lab.reports.page.menu_figures import chosen_figure, looks_of, stages_of
from spectrim.lab.reports.page.quantities import QUANTITIES, Quantity, axis_of

__all__ = ["spectra_section"]

Frames = dict[tuple[int, ...], Frame]

POINTS = 32
"""The most points of a spectrum that are drawn, evenly spread on a logarithmic axis of ranks."""

KINDS = {
    "gradient": "the gradient",
    "momentum": "the momentum",
    "update": "the update",
    "weight": "the weights",
}

FLOOR = 1e-6
"""Singular values below this share of the largest one are rounding errors, and are not drawn."""

MATRICES = 64
"""The most matrices that a menu offers."""


def spectra_section(runs: Sequence[MonitoredRun], *, title: str = "Spectra through training") -> Section | None:
    """The figures of the runs' measurements; None if there are none."""
    # A record may consist of a warning alone.
    measured = [replace(run, records=[each for each in run.records if each["parameters"]]) for run in runs]
    runs = [run for run in measured if run.records]
    if not runs:
        return None
    small = summary_figures(runs)
    notes = [Note(lines=[SUMMARY_NOTE])] if small else []
    made = [spectrum_figure(runs), *notes, *small, layer_figure(runs), matrix_figure(runs)]
    return Section(title=title, items=[Note(lines=[NOTE]), *(item for item in made if item)])


NOTE = (
    "One run of each recipe, measured while it was trained. The gradient is that before the clip of its global norm; "
    "the update is what a step really changed, weight decay included. Layers count from 0."
)

SUMMARY_NOTE = (
    "The small figures are of the matrices of all layers together, the largest value or the median. Spike share: what "
    "the top 1.5% of the singular directions hold of the energy. Stable rank: over how many directions it is spread. "
    "Update over weight: the ratio of their Frobenius norms in one step."
)


# -- Whole spectra -----------------------------------------------------------------------------------------------------


def spectrum_figure(runs: Sequence[MonitoredRun]) -> Figure | None:
    """Singular values of a matrix at a stage of training, a line a recipe; None without exact spectra."""
    exact = {run.name: [record for record in run.records if record.get("spectra")] for run in runs}
    names = ordered({name for records in exact.values() for record in records for name in record["spectra"]})
    if not names:
        return None
    kinds = [kind for kind in KINDS if any_has(exact, names, kind)]
    stages, at = stages_of([exact[run.name] for run in runs])
    frames: Frames = {}
    for matrix, name in enumerate(names):
        for kind_index, kind in enumerate(kinds):
            spectra = [[(record or {}).get("spectra", {}).get(name, {}).get(kind) for record in stage] for stage in at]
            limits = [[limit_of(record, name) if kind == "update" else None for record in stage] for stage in at]
            known = [value for stage in spectra for spectrum in stage if spectrum for value in spectrum if value]
            known += [limit for stage in limits for limit in stage if limit]
            if not known:
                continue
            for stage, (values, bounds) in enumerate(zip(spectra, limits, strict=True)):
                curves = [thinned(spectrum) if spectrum else None for spectrum in values]
                ends = [(1, len(spectrum)) if spectrum else (1, 2) for spectrum in values]
                lines = [(end, (bound, bound)) if bound else None for end, bound in zip(ends, bounds, strict=True)]
                now = [value for curve in (*curves, *lines) if curve for value in curve[1] if value]
                axis = axis_of(known, log=True, shown=now) | {"title.text": f"singular values of {KINDS[kind]}"}
                frames[matrix, kind_index, stage] = Frame(curves=[*curves, *lines], axis=axis)
    short = short_names(names)
    choices = Menus(
        controls=[
            Control(label="Matrix", options=[short[name] for name in names], start=busiest(names)),
            # Recipes differ most in their updates.
            Control(label="Spectrum of", options=kinds, start=kinds.index("update") if "update" in kinds else 0),
            Control(label="Stage", options=stages, start=len(stages) - 1, slider=True),
        ],
        frames=frames,
        tabled=len(runs),
    )
    bounded = any(limit for frame in frames.values() for limit in frame.curves[len(runs) :])
    return chosen_figure(
        looks_of(runs, limits=True),
        choices,
        title="Singular values through training",
        alt="Lines of the singular values of one matrix from the largest to the smallest, one for each recipe, at a "
        "stage of training that the slider chooses.",
        x={"title": "rank of the singular value", "type": "log", **rank_ticks(frames)},
        first="rank",
        note="Both axes are logarithmic; the vertical one follows the slider."
        + (" Dotted: the most that the recipe's clip lets a step move the matrix, before weight decay." * bounded),
    )


def any_has(exact: Mapping[str, Sequence[MonitorRecord]], names: Sequence[str], kind: str) -> bool:
    return any(kind in record["spectra"].get(name, {}) for each in exact.values() for record in each for name in names)


def limit_of(record: MonitorRecord | None, name: str) -> float | None:
    """The bound of clipping on the update's largest singular value, if the record has it."""
    limit: float | None = (record or {}).get("parameters", {}).get(name, {}).get("update_limit")
    return limit


def thinned(spectrum: Sequence[float | None]) -> tuple[list[int], list[float | None]]:
    """At most :data:`POINTS` ranks of a spectrum with their singular values; None for those that are rounding alone."""
    count, floor = len(spectrum), FLOOR * max(value or 0.0 for value in spectrum)
    places = sorted({round(count ** (index / (POINTS - 1))) for index in range(POINTS)})
    chosen = [spectrum[place - 1] for place in places]
    return places, [rounded(value) if value and value >= floor else None for value in chosen]


def rounded(value: float | None) -> float | None:
    """Round to four digits; a logarithmic axis shows positive values only."""
    return float(f"{value:.4g}") if value is not None and value > 0 else None


def rank_ticks(frames: Mapping[tuple[int, ...], Frame]) -> dict[str, Any]:
    last = max(int(curve[0][-1]) for frame in frames.values() for curve in frame.curves if curve)
    ticks = [digit * 10**power for power in range(len(str(last))) for digit in (1, 2, 5)]
    return {"tickvals": ticks, "ticktext": list(map(str, ticks)), "range": [-0.02, math.log10(last) + 0.02]}


# -- Quantities over time ----------------------------------------------------------------------------------------------


def summary_figures(runs: Sequence[MonitoredRun]) -> list[Figure]:
    """A small figure for each quantity that can be combined over the model."""
    made = [summary_figure(runs, key, quantity) for key, quantity in QUANTITIES.items() if quantity.summary]
    return [figure for figure in made if figure]


def summary_figure(runs: Sequence[MonitoredRun], key: str, quantity: Quantity) -> Figure | None:
    """One quantity over training, combined over the matrices of all layers."""
    combine: Callable[[list[float]], float] = max if quantity.summary == "largest" else median
    curves = [
        [(record["step"], combine(found)) for record in run.records if (found := values_in(record, key))]
        for run in runs
    ]
    known = [value for curve in curves for _, value in curve]
    if not known:
        return None
    traces = []
    for look, curve in zip(looks_of(runs), curves, strict=True):
        if curve:
            x, y = zip(*curve, strict=True)
            mode = "lines+markers" if len(x) < 12 else "lines"
            traces.append({**look, "x": x, "y": y, "mode": mode, "hovertemplate": quantity.hover})
    axis = axis_of(known, log=quantity.log, percent=quantity.percent)
    # What the title says already.
    del axis["title.text"]
    shape = layout(x={"title": "step", "rangemode": "tozero"}, y={"title": "", **axis}, hovermode="x unified")
    words = [
        f"{run.name} ends at {quantity.write(curve[-1][1])}." for run, curve in zip(runs, curves, strict=True) if curve
    ]
    steps = sorted({step for curve in curves for step, _ in curve})
    columns = [dict(curve) for curve in curves]
    rows = [
        [f"{step:,}", *(quantity.write(column[step]) if step in column else "-" for column in columns)]
        for step in steps
    ]
    title = f"{quantity.name} ({quantity.summary})"
    return Figure(
        title=title,
        alt=f"Lines over training, one for each recipe: {title}. {' '.join(words)}",
        drawing={"data": traces, "layout": shape},
        numbers=Table(caption=title, rows=[["step", *(run.name for run in runs)], *rows]),
        small=True,
        height=260,
    )


def values_in(record: MonitorRecord, key: str) -> list[float]:
    """A quantity of every matrix in a layer, or of all matrices if none is in a layer."""
    parameters = record["parameters"]
    inside = [name for name in parameters if layer_of(name)[0] is not None] or list(parameters)
    return [value for name in inside if (value := parameters[name].get(key)) is not None]


def layer_figure(runs: Sequence[MonitoredRun]) -> Figure | None:
    """The largest value of a quantity in each layer, at a stage of training."""
    layers = sorted({layer for run in runs for layer in layers_of(run) if layer is not None})
    if len(layers) < 2:
        return None
    stages, at = stages_of([run.records for run in runs])
    keys = present(runs)
    frames: Frames = {}
    for key_index, key in enumerate(keys):
        tables = [[largest_by_layer(record, key) if record else {} for record in stage] for stage in at]
        known = [value for stage in tables for table in stage for value in table.values()]
        for stage, values in enumerate(tables):
            curves = [(layers, [rounded(table.get(layer)) for layer in layers]) if table else None for table in values]
            now = [value for table in values for value in table.values()]
            frames[key_index, stage] = Frame(curves=curves, axis=axis_for(key, known, "largest in the layer", now))
    choices = Menus(
        controls=[
            Control(label="Quantity", options=[QUANTITIES[key].name for key in keys], start=starting(keys)),
            Control(label="Stage", options=stages, start=len(stages) - 1, slider=True),
        ],
        frames=frames,
        tabled=len(runs),
    )
    return chosen_figure(
        looks_of(runs),
        choices,
        title="Largest value in each layer",
        alt="Lines over the layers of the model, one for each recipe, of the largest value among a layer's matrices.",
        x={"title": "layer", "tickmode": "auto" if len(layers) > 12 else "linear", "dtick": 1},
        first="layer",
    )


def largest_by_layer(record: MonitorRecord, key: str) -> dict[int, float]:
    found: dict[int, float] = {}
    for name, values in record["parameters"].items():
        layer, _ = layer_of(name)
        if layer is not None and (value := values.get(key)) is not None:
            found[layer] = max(value, found.get(layer, value))
    return found


def layers_of(run: MonitoredRun) -> set[int | None]:
    return {layer_of(name)[0] for record in run.records for name in record["parameters"]}


def matrix_figure(runs: Sequence[MonitoredRun]) -> Figure | None:
    """Any quantity of any matrix over training."""
    names = ordered({name for run in runs for record in run.records for name in record["parameters"]})
    if len(names) > MATRICES:
        names = [names[round(index * (len(names) - 1) / (MATRICES - 1))] for index in range(MATRICES)]
    keys = present(runs)
    frames: Frames = {}
    for matrix, name in enumerate(names):
        for key_index, key in enumerate(keys):
            curves: list[Any] = []
            for run in runs:
                steps = [record["step"] for record in run.records]
                values = [rounded(record["parameters"].get(name, {}).get(key)) for record in run.records]
                curves.append((steps, values) if any(values) else None)
            known = [value for curve in curves if curve for value in curve[1] if value is not None]
            if known:
                frames[matrix, key_index] = Frame(curves=curves, axis=axis_for(key, known, ""))
    if not frames:
        return None
    short = short_names(names)
    choices = Menus(
        controls=[
            Control(label="Matrix", options=[short[name] for name in names], start=busiest(names)),
            Control(label="Quantity", options=[QUANTITIES[key].name for key in keys], start=starting(keys)),
        ],
        frames=frames,
        tabled=len(runs),
    )
    return chosen_figure(
        looks_of(runs),
        choices,
        title="One matrix over training",
        alt="Lines over training, one for each recipe, of a quantity of one matrix.",
        x={"title": "step", "rangemode": "tozero"},
        first="step",
    )


# -- What there is to choose from --------------------------------------------------------------------------------------


def ordered(names: set[str]) -> list[str]:
    """Sort names by layer; those outside of layers come last."""
    return sorted(names, key=lambda name: (layer_of(name)[0] is None, layer_of(name)[0] or 0, name))


def busiest(names: Sequence[str]) -> int:
    """The matrix that is shown first: the feed-forward one of the middle layer, which is the largest."""
    layers = sorted({layer for name in names if (layer := layer_of(name)[0]) is not None})
    if not layers:
        return 0
    middle = [index for index, name in enumerate(names) if layer_of(name)[0] == layers[len(layers) // 2]]
    return next((index for index in middle if "up" in names[index] or "fc" in names[index]), middle[0])


def present(runs: Sequence[MonitoredRun]) -> list[str]:
    """The quantities that any matrix of any run has."""
    found = {
        key
        for run in runs
        for record in run.records
        for values in record["parameters"].values()
        for key, value in values.items()
        if value is not None
    }
    return [key for key in QUANTITIES if key in found]


def starting(keys: Sequence[str]) -> int:
    return keys.index("update_to_weight") if "update_to_weight" in keys else 0


def axis_for(key: str, known: Sequence[float], of: str, shown: Sequence[float] | None = None) -> dict[str, Any]:
    quantity = QUANTITIES[key]
    axis = axis_of(known, log=quantity.log, percent=quantity.percent, shown=shown)
    return {**axis, "title.text": f"{quantity.name.lower()}, {of}" if of else quantity.name.lower()}
