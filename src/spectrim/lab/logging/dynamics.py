"""Training dynamics from a run's log: the time of its steps, whether it diverged, and its loss spikes.

They come from the log, so unfinished runs have them too. Relied on by :mod:`spectrim.lab.experiments.results`.
"""

from collections.abc import Sequence
from itertools import accumulate
from statistics import median
from typing import Any

from spectrim.lab.settings import Config

__all__ = ["Dynamics", "find_spikes", "read_dynamics", "step_seconds"]

SPIKE_WINDOW = 50
"""Losses before a step that it is compared with."""
SPIKE_HISTORY = 20
"""The fewest losses before a step that can be a spike."""
SPIKE_DEVIATIONS = 5.0
"""Robust standard deviations above the median; normal noise exceeds this once in three million steps."""
ROBUST = 1.4826
"""Standard deviation over median absolute deviation of a normal distribution."""


class Dynamics(Config):
    """A run's course."""

    seconds: tuple[float, ...]
    """Time of all steps up to each evaluation, without evaluations and checkpoints."""
    unevenness: float
    """Time of all steps over that of as many median steps; far above 1 if the machine was busy or the optimizer
    works in bursts."""
    diverged: bool
    """The last validation loss is not finite or above the loss that training began with, or most steps were skipped."""
    loss_spikes: int
    """See :func:`find_spikes`."""
    spike_steps: int | None = None
    """Steps of all loss spikes; None in results of earlier versions."""
    skipped: int = 0
    """Skipped steps, whose gradient was not finite."""


def read_dynamics(records: Sequence[dict[str, Any]]) -> Dynamics | None:
    """The training dynamics of a run from its log; None without an evaluation."""
    evaluated = [index for index, record in enumerate(records) if "val_loss" in record]
    if not evaluated:
        return None
    each = [step_seconds(record) for record in records]
    total = list(accumulate(each))
    skipped = sum(record.get("grad_norm", 0.0) is None for record in records)
    final, start = records[evaluated[-1]]["val_loss"], records[0]["loss"]
    spikes = find_spikes([record["loss"] for record in records])
    return Dynamics(
        seconds=tuple(round(total[index], 6) for index in evaluated),
        unevenness=total[-1] / (len(each) * median(each)),
        diverged=final is None or (start is not None and final > start) or 2 * skipped > len(records),
        loss_spikes=len(spikes),
        spike_steps=sum(spikes),
        skipped=skipped,
    )


STEP_PARTS = ("forward_backward_ms", "gradient_clip_ms", "optimizer_ms", "logging_ms", "rest_ms")
"""As in :func:`spectrim.lab.training.run_statistics.step_times`."""


def step_seconds(record: dict[str, Any]) -> float:
    """The time of one step, without evaluation and checkpoint."""
    return float(sum(record.get(key, 0.0) for key in STEP_PARTS)) / 1000


def find_spikes(losses: Sequence[float | None]) -> list[int]:
    """The lengths in steps of all jumps of the training loss; adjacent steps are one spike.

    A step spikes if its loss is not finite, or lies more than :data:`SPIKE_DEVIATIONS` robust standard deviations above
    the median of the :data:`SPIKE_WINDOW` finite losses before it that are no spikes themselves.
    """
    lengths: list[int] = []
    spiking = False
    calm: list[float] = []
    for loss in losses:
        jumped = loss is None
        if loss is not None and len(calm) >= SPIKE_HISTORY:
            window = calm[-SPIKE_WINDOW:]
            middle = median(window)
            deviation = ROBUST * median(abs(value - middle) for value in window)
            jumped = loss > middle + SPIKE_DEVIATIONS * deviation
        if jumped and spiking:
            lengths[-1] += 1
        elif jumped:
            lengths.append(1)
        spiking = jumped
        if loss is not None and not jumped:
            calm.append(loss)
    return lengths
