"""The figures of a report page on spectra that draw lines of one matrix, which a menu chooses."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spectrim.lab.logging.monitor_log import MonitoredRun
from spectrim.lab.reports.page.figures import scatter
from spectrim.lab.reports.page.html import Control, Figure, Frame
from spectrim.lab.reports.page.menu_figures import looks_of, matrix_menu, menu_figure, thinned
from spectrim.lab.reports.page.quantities import axis_of
from spectrim.lab.reports.spectra.dot_figures import GREY, KINDS, Matrix, Subjects, names_of

__all__ = [
    "direction_figure",
    "operator_figure",
    "spectrum_figure",
    "tail_figure",
]

Curve = tuple[Sequence[float], Sequence[float | None]] | None


def matrix_figure(
    names: Sequence[str],
    menu: Control | None,
    looks: Sequence[dict[str, Any]],
    curves: Callable[[str, int], list[Curve]],
    *,
    y: str,
    **more: Any,
) -> Figure | None:
    """A figure with a menu of matrices and perhaps another; ``curves`` returns those of a matrix at an option."""

    def frame(matrix: int, option: int = 0) -> Frame | None:
        found = curves(names[matrix], option)
        known = [value for curve in found if curve for value in curve[1] if value]
        return Frame(curves=found, axis=axis_of(known, log=True, title=y)) if known else None

    controls = [matrix_menu(names), menu] if menu else [matrix_menu(names)]
    return menu_figure(looks, controls, frame, **more)


def subject_looks(subjects: Subjects) -> list[dict[str, Any]]:
    """A line for every subject, and a dotted one for its bound."""
    runs = [MonitoredRun(name=name, index=index, records=()) for index, name in enumerate(subjects)]
    return looks_of(runs, limits=True)


def spectrum_figure(subjects: Subjects) -> Figure | None:
    """Singular values of any matrix and kind; for a mean gradient also those that noise alone would give."""
    every = [each for subject in subjects.values() for each in subject["matrices"].values()]
    kinds = [kind for kind in KINDS if any(each.get(kind) for each in every)]

    def curves(name: str, kind: int) -> list[Curve]:
        found = [(subject["matrices"].get(name) or {}).get(kinds[kind]) or {} for subject in subjects.values()]
        return [thinned(each[key]) if key in each else None for key in ("spectrum", "floor") for each in found]

    return matrix_figure(
        names_of(subjects),
        Control(label="Spectrum of", options=[KINDS[kind][0] for kind in kinds]),
        subject_looks(subjects),
        curves,
        y="singular value",
        tabled=len(subjects),
        title="Singular values",
        alt="Lines of the singular values of one matrix from the largest to the smallest, one for each model.",
        x={"title": "rank of the singular value"},
        first="rank",
        ranks=True,
        note="Both axes are logarithmic. Dotted, under a mean gradient: what noise alone would give there at this "
        "number of batches.",
    )


def direction_figure(subjects: Subjects) -> Figure | None:
    """Relative variance of the singular directions of any matrix."""

    def curves(name: str, _: int) -> list[Curve]:
        found = [(subject["matrices"].get(name) or {}).get("directions") or () for subject in subjects.values()]
        return [groups_of(each, key) for key in ("relative", "at_least") for each in found]

    return matrix_figure(
        names_of(subjects, "directions"),
        None,
        subject_looks(subjects),
        curves,
        y="variance over squared mean",
        tabled=len(subjects),
        title="Relative variance of singular directions over batches",
        alt="Lines of the variance over batches of the gradient along a singular direction over its squared mean, "
        "against the rank of the direction.",
        x={"title": "rank of the direction (middle of a group)"},
        first="rank",
        ranks=True,
        note="Directions from one half of the batches, measured on the other. Dotted: bounds from below, where the "
        "mean is lost in noise.",
    )


def groups_of(groups: Sequence[Mapping[str, Any]], key: str) -> Curve:
    """Middles of the groups of ranks, and their values; None without values."""
    if not any(group[key] for group in groups):
        return None
    return [round((group["first"] * group["last"]) ** 0.5, 2) for group in groups], [group[key] for group in groups]


def tail_figure(subjects: Subjects) -> Figure | None:
    """Density of the noise's entries and the fits to it, of any matrix."""

    def curves(matrix: Matrix) -> list[Curve]:
        drawn = matrix["tails"]["histogram"]
        return [(drawn["size"], drawn[key]) for key in ("observed", "gaussian", "student", "contaminated")]

    return line_figure(
        subjects,
        "tails",
        curves,
        title="Entries of the noise, and fits to their density",
        lines={
            "entries": {"mode": "markers", "marker": {"color": GREY, "size": 6}},
            "Gaussian": line("#56B4E9", "dash"),
            "Student": line("#D55E00", "solid"),
            "Cauchy-contaminated": line("#009E73", "dashdot"),
        },
        x={
            "title": "|N| over its standard deviation", "type": "log",
            "tickvals": [0.01, 0.1, 1, 10, 100, 1000], "ticktext": ["0.01", "0.1", "1", "10", "100", "1000"],
        },
        y="density",
        floor=1e-8,
        note="Both axes are logarithmic. All entries of a matrix together: entries of unlike variance have a heavy "
        "tail together, though none of them has one.",
    )  # fmt: skip


def operator_figure(subjects: Subjects) -> Figure | None:
    """The ratio of signal squared to noise after operators, against the remaining energy, for any matrix."""
    operators = {
        "soft clip": ("spectral soft clip", line("#0072B2", "solid")),
        "hard clip": ("spectral hard clip", line("#56B4E9", "dash")),
        "shrink": ("entries shrunk", line("#D55E00", "solid")),
        "clamp": ("entries clamped", line("#E69F00", "dash")),
        "norm": ("norm bounded", line(GREY, "dot")),
    }

    def curves(matrix: Matrix) -> list[Curve]:
        found: list[Curve] = []
        for key in operators:
            points = [(100 * each["energy"], each["gain"]) for each in matrix["operators"] if each["operator"] == key]
            places, values = zip(*[(100.0, 1.0), *points], strict=True)
            found.append(([round(place, 1) for place in places], list(values)))
        return found

    return line_figure(
        subjects,
        "operators",
        curves,
        title="What clipping and shrinking leave: signal squared over noise",
        lines={label: {**look, "mode": "lines+markers"} for label, look in operators.values()},
        x={
            "title": "energy left (%), from weak to strong", "type": "log", "autorange": "reversed",
            "tickvals": [100, 50, 20, 10, 5], "ticktext": ["100", "50", "20", "10", "5"],
        },
        y="signal² over noise left",
        floor=1e-4,
        note="1 is what scaling does, which a learning rate does as well. Below it, an operator takes more of the mean "
        "than of the noise.",
    )  # fmt: skip


def line(stroke: str, dash: str) -> dict[str, Any]:
    return {"mode": "lines", "line": {"color": stroke, "dash": dash, "width": 2.25}}


def line_figure(
    subjects: Subjects,
    having: str,
    curves: Callable[[Matrix], list[Curve]],
    *,
    title: str,
    lines: Mapping[str, Mapping[str, Any]],
    floor: float,
    **more: Any,
) -> Figure | None:
    """Named lines of one matrix of one model, which menus choose; values below ``floor`` are left out."""

    def of_model(name: str, model: int) -> list[Curve]:
        matrix = list(subjects.values())[model]["matrices"].get(name) or {}
        return [above(curve, floor) for curve in curves(matrix)] if matrix.get(having) else []

    return matrix_figure(
        names_of(subjects, having),
        Control(label="Model", options=list(subjects)) if len(subjects) > 1 else None,
        [scatter(None, label, (), (), hover="%{y:.3g}", **look) for label, look in lines.items()],
        of_model,
        tabled=len(lines),
        title=title,
        alt=f"{title}: lines of {', '.join(lines)}.",
        first="at",
        **more,
    )


def above(curve: Curve, floor: float) -> Curve:
    """The curve in four digits, without values below the floor."""
    if curve is None:
        return None
    places, values = curve
    kept = [None if value is None or value < floor else float(f"{value:.4g}") for value in values]
    return [float(f"{place:.4g}") for place in places], kept
