"""The quantities of a matrix that a report page shows over training: their names, and the axes they are drawn on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["QUANTITIES", "Quantity", "axis_of"]


NEAR = 5.0
"""Ratio of the largest to the smallest value below which an axis is linear."""

NARROW = 0.5
"""Decades below which a logarithmic axis has ticks as a linear one."""


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
        """Plotly's template for the label of a point."""
        return "%{y:.1%}" if self.percent else "%{y:.3g}"

    def write(self, value: float) -> str:
        """A value in a table."""
        return f"{value:.1%}" if self.percent else f"{value:.3g}"

    def axis(self, known: Sequence[float], *, shown: Sequence[float] | None = None, title: str = "") -> dict[str, Any]:
        """The vertical axis of a figure, see :func:`axis_of`."""
        return axis_of(known, log=self.log, percent=self.percent, shown=shown, title=title)


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
"""Quantities by their keys in a record, in the order of a menu."""


def axis_of(
    known: Sequence[float],
    *,
    log: bool,
    percent: bool = False,
    shown: Sequence[float] | None = None,
    title: str = "",
) -> dict[str, Any]:
    """Scale and ticks of a vertical axis, by plotly's dotted keys, the same for every axis.

    Plotly itself fits the range to the curves that are shown, so the axis follows menus and sliders.

    Args:
        known: every value that the axis may have to show; they decide whether it is logarithmic.
        log: whether it may be.
        percent: whether values are shares.
        shown: the values of one stage, which decide its ticks; ``known`` unless given.
        title: of the axis.
    """
    positive = [value for value in known if value > 0]
    wide = log and bool(positive) and max(positive) >= NEAR * min(positive)
    now = [value for value in (known if shown is None else shown) if value > 0] or positive
    decades = math.log10(max(now) / min(now)) if wide else 0.0
    return {
        "title.text": title,
        "type": "log" if wide else "linear",
        "autorange": True,
        "rangemode": "normal" if log else "tozero",
        # Plotly would label every digit of a decade, so that labels overlap: "D2" is 1, 2 and 5, 1 powers of ten alone.
        "tickmode": "linear" if decades > NARROW else "auto",
        "dtick": ("D2" if decades < 3.5 else 1) if decades > NARROW else None,
        # With a format, plotly writes the whole number at every tick of a logarithmic axis.
        "tickformat": ".0%" if percent else "~g" if wide else "",
    }
