"""What a measurement says, as a record of plain numbers: one line of ``monitor.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NotRequired, TypedDict

from spectrim.monitor.buffer import Lists, PartMeasurement

__all__ = ["Alert", "Record", "entry_of", "rounded", "spectra_of"]

DIGITS = 6


class Alert(TypedDict):
    """A warning: a quantity of a parameter that left its trend. Deviations are None where the value is not finite."""

    parameter: str
    quantity: str
    value: float | None
    trend: float | None
    deviations: float | None
    message: str


class Record(TypedDict):
    """What every sink gets. A number that is not finite is None."""

    step: int
    """Optimizer steps taken, from 1."""
    skipped: int
    """Steps of single parameters that were skipped for a gradient that is not finite, in all so far."""
    parameters: dict[str, dict[str, float | int | None]]
    """Metrics by the name of the matrix; empty in a record that only warns."""
    spectra: NotRequired[dict[str, dict[str, list[float | None]]]]
    """Singular values by name and kind, descending, on exact steps."""
    alarms: NotRequired[list[Alert]]
    ms: float
    """What the monitor took since the measurement before, this one included."""


def entry_of(found: PartMeasurement, skipped: int) -> dict[str, float | int | None]:
    """The metrics of one part of a parameter.

    Of a stack of E matrices, norms and root mean squares are of the whole stack, the spectral norm is the largest one,
    shares are of the whole stack's energy or singular values, and the rest are means over the matrices that have any.
    """
    entry: dict[str, float] = {}
    readings = found.readings
    gradient, update, weight = (readings.get(kind) for kind in ("gradient", "update", "weight"))
    if gradient is not None:
        scale = gradient_scale(found)
        spectrum = _spectrum("gradient", gradient)
        entry |= {**spectrum, "gradient_norm": math.sqrt(found.before) if found.before else spectrum["gradient_norm"]}
        entry["gradient_spectral_norm"] *= scale
        entry["gradient_localisation"] = _mean(map(_ratio, gradient["largest"], gradient["norm"]))
        entry["gradient_tail_index"] = _mean(gradient["tail_index"])
    if update is not None:
        entry |= _spectrum("update", update)
        entry["update_rms"] = entry["update_norm"] / math.sqrt(math.prod(found.shape))
        if found.limit is not None:
            entry["update_limit"] = found.limit
    if weight is not None:
        entry |= _spectrum("weight", weight)
        del entry["weight_spike_share"]
    if update is not None and weight is not None:
        entry["update_to_weight"] = _ratio(entry["update_norm"], entry["weight_norm"])
    if "direction" in readings and entry["update_norm"] > 0:
        above = readings["direction"]["above"]
        entry["above_threshold"] = sum(above) / len(above)
    return {**{name: rounded(value) for name, value in entry.items()}, "skipped": skipped}


def spectra_of(found: PartMeasurement) -> dict[str, list[float | None]]:
    """The singular values of what was measured exactly, by kind; those of a stack together."""
    spectra: dict[str, list[float | None]] = {}
    for kind, matrices in found.spectra.items():
        if kind != "direction":
            scale = gradient_scale(found) if kind == "gradient" else 1.0
            values = [scale * value for matrix in matrices for value in matrix]
            # What is not a number first, as torch sorts.
            values.sort(key=lambda value: math.inf if math.isnan(value) else value, reverse=True)
            spectra[kind] = [rounded(value) for value in values]
    return spectra


def gradient_scale(found: PartMeasurement) -> float:
    """By what a global clip divided the gradient since it was accumulated: it scales, and changes nothing else."""
    now = sum(found.readings["gradient"]["energy"])
    if found.before is None or not (0 < now < math.inf and 0 < found.before < math.inf):
        return 1.0
    return math.sqrt(found.before / now)


def rounded(value: float | None) -> float | None:
    """Six significant digits, and None for what JSON has no word for."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")


def _spectrum(kind: str, reading: Lists) -> dict[str, float]:
    energy, norms = reading["energy"], reading["norm"]
    share = _ratio(sum(reading["spike"]), sum(energy))
    return {
        f"{kind}_norm": math.sqrt(sum(energy)),
        f"{kind}_spectral_norm": math.nan if any(map(math.isnan, norms)) else max(norms),
        f"{kind}_stable_rank": _mean(_ratio(part, norm * norm) for part, norm in zip(energy, norms, strict=True)),
        f"{kind}_spike_share": 1.0 if share > 1 else share,
    }


def _mean(values: Iterable[float]) -> float:
    """Over the matrices of a stack that have a value."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
