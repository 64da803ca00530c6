"""The quantities of a matrix that a report page shows over training: their names, and the axes they are drawn on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["QUANTITIES", "Quantity", "axis_of"]


NEAR = 5.0
"""Ratio of the largest to the smallest value below which an axis is linear."""


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """Name and axis of a number that the monitor measures."""

    name: str
    log: bool = True
    percent: bool = False
    summary: Literal["largest", "median", ""] = ""
    """How values of all matrices are combined into one; empty if no such figure is drawn."""

    @property
    def hover(self) -> str:
        """Of a point, as plotly's template."""
        return "%{y:.1%}" if self.percent else "%{y:.3g}"

    def write(self, value: float) -> str:
        """A value in a table."""
        return f"{value:.1%}" if self.percent else f"{value:.3g}"


QUANTITIES: dict[str, Quantity] = {
    "update_to_weight": Quantity(name="Update over weight", summary="largest"),
    "update_spectral_norm": Quantity(name="Spectral norm of the update"),
    "update_rms": Quantity(name="RMS of the update"),
    "update_stable_rank": Quantity(name="Stable rank of the update", summary="median"),
    "above_threshold": Quantity(
        name="Singular values above the clip threshold", log=False, percent=True, summary="median"
    ),
    "gradient_norm": Quantity(name="Norm of the gradient"),
    "gradient_spectral_norm": Quantity(name="Spectral norm of the gradient"),
    "gradient_stable_rank": Quantity(name="Stable rank of the gradient", summary="median"),
    "gradient_spike_share": Quantity(name="Spike share of the gradient", log=False, percent=True, summary="median"),
    "gradient_localisation": Quantity(name="Localisation of the gradient"),
    "gradient_tail_index": Quantity(name="Tail index of the gradient's entries"),
    "update_spike_share": Quantity(name="Spike share of the update", log=False, percent=True),
    "weight_norm": Quantity(name="Norm of the weights"),
    "weight_spectral_norm": Quantity(name="Spectral norm of the weights", summary="largest"),
    "weight_stable_rank": Quantity(name="Stable rank of the weights"),
}
"""By their keys in a record, in the order of a menu."""


def axis_of(known: Sequence[float], *, log: bool, percent: bool = False) -> dict[str, Any]:
    """A vertical axis of plotly's that holds all of these values, by dotted keys that are the same for every axis."""
    axis: dict[str, Any] = {"title.text": "", "autorange": False, "tickformat": ".0%" if percent else ""}
    positive = [value for value in known if value > 0]
    near = bool(positive) and max(positive) < NEAR * min(positive)
    if not log or not positive or near:
        high = max([*known, 0.0]) or 1.0
        low = min(positive) if log and near else 0.0
        margin = 0.06 * (high - low) or 0.06 * high
        span = [float(f"{max(low - margin, 0.0):.4g}"), float(f"{high + margin:.4g}")]
        return {**axis, "type": "linear", "range": span, "tickmode": "auto", "tickvals": [], "ticktext": []}
    low, high = math.log10(min(positive)), math.log10(max(positive))
    margin = max(0.04 * (high - low), 0.02)
    low, high = low - margin, high + margin
    ticks = log_ticks(low, high)
    return {
        **axis,
        "type": "log",
        "range": [round(low, 4), round(high, 4)],
        "tickmode": "array",
        "tickvals": ticks,
        "ticktext": [f"{tick:g}" for tick in ticks],
    }


def log_ticks(low: float, high: float) -> list[float]:
    """Places to write numbers at between two powers of ten: as many digits as there is room for."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    every = max(1, round((high - low) / 7))
    digits = (1, 2, 5) if high - low < 3 else (1,)
    places = [float(f"{digit}e{power}") for power in powers if power % every == 0 for digit in digits]
    return [place for place in places if low <= math.log10(place) <= high]
