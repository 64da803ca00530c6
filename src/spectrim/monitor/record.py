"""Records: the metrics of one step as plain numbers, one line of ``monitor.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NotRequired, TypedDict

from spectrim.monitor.buffer import PartMeasurement, Reading

__all__ = ["Alert", "Record", "entry_of", "record_of", "rounded", "spectra_of"]

DIGITS = 6


class Alert(TypedDict):
    """A warning that a quantity of a parameter left its trend. Numbers are None if the value is not finite."""

    parameter: str
    quantity: str
    value: float | None
    trend: float | None
    deviations: float | None
    message: str


class Record(TypedDict):
    """A record, as every sink gets it. Numbers that are not finite are None."""

    step: int
    """Optimizer steps taken, from 1."""
    skipped: int
    """Skipped steps so far, summed over the parameters whose gradient was not finite."""
    parameters: dict[str, dict[str, float | int | None]]
    """Name of the matrix -> metrics; empty in a record that only has alarms."""
    spectra: NotRequired[dict[str, dict[str, list[float | None]]]]
    """Singular values by name and kind, descending, on exact steps."""
    alarms: NotRequired[list[Alert]]
    ms: float
    """Host milliseconds of the monitor since the measurement before, including this one."""


def record_of(step: int, parts: Sequence[PartMeasurement], skips: Mapping[str, int]) -> Record:
    """The record of a measurement, from its parts and the skipped steps by parameter name."""
    record: Record = {
        "step": step,
        "skipped": sum(skips.values()),
        "parameters": {part.name: entry_of(part, skips.get(part.subject.name, 0)) for part in parts},
        "ms": 0.0,
    }
    if spectra := {part.name: found for part in parts if (found := spectra_of(part))}:
        record["spectra"] = spectra
    return record


def entry_of(found: PartMeasurement, skipped: int) -> dict[str, float | int | None]:
    """The metrics of one part of a parameter.

    For a stack of matrices, norms, root mean squares and shares refer to the whole stack, the spectral norm is the
    largest, and other metrics are means over the matrices with a finite value.
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
    """Kind -> singular values, for kinds that were measured exactly; those of a stack are merged."""
    spectra: dict[str, list[float | None]] = {}
    for kind, reading in found.readings.items():
        if "singular_values" in reading:
            scale = gradient_scale(found) if kind == "gradient" else 1.0
            values = [scale * value for matrix in reading["singular_values"] for value in matrix]
            # NaN first, as torch sorts.
            values.sort(key=lambda value: math.inf if math.isnan(value) else value, reverse=True)
            spectra[kind] = [rounded(value) for value in values]
    return spectra


def gradient_scale(found: PartMeasurement) -> float:
    """The factor by which the training loop's global norm clip has scaled the gradient down."""
    now = sum(found.readings["gradient"]["energy"])
    if found.before is None or not (0 < now < math.inf and 0 < found.before < math.inf):
        return 1.0
    return math.sqrt(found.before / now)


def rounded(value: float | None) -> float | None:
    """Round to six significant digits; None for NaN and infinity, which JSON lacks."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")


def _spectrum(kind: str, reading: Reading) -> dict[str, float]:
    energy, norms = reading["energy"], reading["norm"]
    share = _ratio(sum(reading["spike"]), sum(energy))
    return {
        f"{kind}_norm": math.sqrt(sum(energy)),
        f"{kind}_spectral_norm": math.nan if any(map(math.isnan, norms)) else max(norms),
        f"{kind}_stable_rank": _mean(_ratio(part, norm * norm) for part, norm in zip(energy, norms, strict=True)),
        f"{kind}_spike_share": 1.0 if share > 1 else share,
    }


def _mean(values: Iterable[float]) -> float:
    """The mean without NaNs."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
