"""Spectra through training on a report page: the monitors' records of several runs, with a slider over time. A run is a
:class:`spectrim.lab.logging.monitor_log.MonitoredRun`. Runs without a monitor have no section.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from statistics import median
from typing import Any

from spectrim.lab.logging.monitor_log import MonitoredRun, MonitorRecord, layer_of, values_in_layers
from spectrim.lab.reports.page.figures import layout
from spectrim.lab.reports.page.html import Control, Figure, Frame, Note, Section, Table
from spectrim.lab.reports.page.menu_figures import looks_of, matrix_menu, menu_figure, rounded, stages_of, thinned
from spectrim.lab.reports.page.quantities import QUANTITIES, Quantity, axis_of

__all__ = ["spectra_section"]

KINDS = {
    "gradient": "the gradient",
    "momentum": "the momentum",
    "update": "the update",
    "weight": "the weights",
}

MATRICES = 64
"""The most matrices that a menu offers."""


def spectra_section(runs: Sequence[MonitoredRun], *, title: str = "Spectra through training") -> Section | None:
    """The figures of the runs' measurements; None if there are none."""
    # A record may consist of a warning alone.
    measured = [replace(run, records=[each for each in run.records if each["parameters"]]) for run in runs]
    runs = [run for run in measured if run.records]
    if not runs:
        return None
    made = [summary_figure(runs, key, quantity) for key, quantity in QUANTITIES.items() if quantity.summary]
    small = [figure for figure in made if figure]
    notes = [Note(lines=[SUMMARY_NOTE])] if small else []
    items = [Note(lines=[NOTE]), spectrum_figure(runs), *notes, *small, layer_figure(runs), matrix_figure(runs)]
    return Section(title=title, items=[item for item in items if item])


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
    exact = [[record for record in run.records if record.get("spectra")] for run in runs]
    held = [record["spectra"] for records in exact for record in records]
    names = ordered({name for spectra in held for name in spectra})
    if not names:
        return None
    kinds = [kind for kind in KINDS if any(kind in each for spectra in held for each in spectra.values())]
    slider, at = stages_of(exact)

    @cache
    def measured(matrix: int, kind: int) -> tuple[list[Any], list[Any], list[float]]:
        """Spectra and bounds of all runs at every stage, and all values that are not zero."""
        name, key = names[matrix], kinds[kind]
        spectra = [[(record or {}).get("spectra", {}).get(name, {}).get(key) for record in stage] for stage in at]
        limits = [[limit_of(record, name) if key == "update" else None for record in stage] for stage in at]
        known = [value for stage in spectra for spectrum in stage for value in spectrum or () if value]
        return spectra, limits, known + [limit for stage in limits for limit in stage if limit]

    def frame(matrix: int, kind: int, stage: int) -> Frame | None:
        spectra, limits, known = measured(matrix, kind)
        if not known:
            return None
        curves: list[Any] = [thinned(spectrum) if spectrum else None for spectrum in spectra[stage]]
        ends = [(1, len(spectrum)) if spectrum else (1, 2) for spectrum in spectra[stage]]
        curves += [(end, (limit, limit)) if limit else None for end, limit in zip(ends, limits[stage], strict=True)]
        now = [value for curve in curves if curve for value in curve[1] if value]
        axis = axis_of(known, log=True, shown=now, title=f"singular values of {KINDS[kinds[kind]]}")
        return Frame(curves=curves, axis=axis)

    # Recipes differ most in their updates.
    start = kinds.index("update") if "update" in kinds else 0
    bounded = "update" in kinds and any(limit_of(each, name) for records in exact for each in records for name in names)
    return menu_figure(
        looks_of(runs, limits=True),
        [matrix_menu(names), Control(label="Spectrum of", options=kinds, start=start), slider],
        frame,
        tabled=len(runs),
        title="Singular values through training",
        alt="Lines of the singular values of one matrix from the largest to the smallest, one for each recipe, at a "
        "stage of training that the slider chooses.",
        x={"title": "rank of the singular value"},
        first="rank",
        ranks=True,
        note="Both axes are logarithmic; the vertical one follows the slider."
        + (" Dotted: the most that the recipe's clip lets a step move the matrix, before weight decay." * bounded),
    )


def limit_of(record: MonitorRecord | None, name: str) -> float | None:
    """The bound of clipping on the update's largest singular value, if the record has it."""
    limit: float | None = (record or {}).get("parameters", {}).get(name, {}).get("update_limit")
    return limit


# -- Quantities over time ----------------------------------------------------------------------------------------------


def summary_figure(runs: Sequence[MonitoredRun], key: str, quantity: Quantity) -> Figure | None:
    """One quantity over training, combined over the matrices of all layers."""
    combine: Callable[[list[float]], float] = max if quantity.summary == "largest" else median
    curves = [
        [(record["step"], combine(found)) for record in run.records if (found := values_in_layers(record, key))]
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
    axis = quantity.axis(known)
    # The figure's title names the quantity.
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


def layer_figure(runs: Sequence[MonitoredRun]) -> Figure | None:
    """The largest value of a quantity in each layer, at a stage of training."""
    found = {layer_of(name)[0] for run in runs for record in run.records for name in record["parameters"]}
    layers = sorted(layer for layer in found if layer is not None)
    if len(layers) < 2:
        return None
    slider, at = stages_of([run.records for run in runs])
    keys = present(runs)

    @cache
    def tables(key: str) -> list[list[dict[int, float]]]:
        return [[largest_by_layer(record, key) if record else {} for record in stage] for stage in at]

    def frame(key: int, stage: int) -> Frame:
        quantity, values = QUANTITIES[keys[key]], tables(keys[key])
        known = [value for stage in values for table in stage for value in table.values()]
        now = [value for table in values[stage] for value in table.values()]
        curves = [
            (layers, [rounded(table.get(layer)) for layer in layers]) if table else None for table in values[stage]
        ]
        axis = quantity.axis(known, shown=now, title=f"{quantity.name.lower()}, largest in the layer")
        return Frame(curves=curves, axis=axis)

    return menu_figure(
        looks_of(runs),
        [quantity_menu(keys), slider],
        frame,
        tabled=len(runs),
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


def matrix_figure(runs: Sequence[MonitoredRun]) -> Figure | None:
    """Any quantity of any matrix over training."""
    names = ordered({name for run in runs for record in run.records for name in record["parameters"]})
    if len(names) > MATRICES:
        names = [names[round(index * (len(names) - 1) / (MATRICES - 1))] for index in range(MATRICES)]
    keys = present(runs)

    def frame(matrix: int, key: int) -> Frame | None:
        quantity, curves = QUANTITIES[keys[key]], []
        for run in runs:
            held = [record["parameters"].get(names[matrix], {}) for record in run.records]
            values = [rounded(each.get(keys[key])) for each in held]
            curves.append(([record["step"] for record in run.records], values) if any(values) else None)
        known = [value for curve in curves if curve for value in curve[1] if value is not None]
        return Frame(curves=curves, axis=quantity.axis(known, title=quantity.name.lower())) if known else None

    return menu_figure(
        looks_of(runs),
        [matrix_menu(names), quantity_menu(keys)],
        frame,
        tabled=len(runs),
        title="One matrix over training",
        alt="Lines over training, one for each recipe, of a quantity of one matrix.",
        x={"title": "step", "rangemode": "tozero"},
        first="step",
    )


# -- What there is to choose from --------------------------------------------------------------------------------------


def ordered(names: set[str]) -> list[str]:
    """Sort names by layer; those outside of layers come last."""
    return sorted(names, key=lambda name: (layer_of(name)[0] is None, layer_of(name)[0] or 0, name))


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


def quantity_menu(keys: Sequence[str]) -> Control:
    start = keys.index("update_to_weight") if "update_to_weight" in keys else 0
    return Control(label="Quantity", options=[QUANTITIES[key].name for key in keys], start=start)
