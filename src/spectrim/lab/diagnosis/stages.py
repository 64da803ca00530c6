"""Spectra at several stages of a run, from the lines that its monitor has written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spectrim.lab.diagnosis.matrices import ChosenMatrix
from spectrim.lab.errors import LabError
from spectrim.lab.logging.monitor_log import read_measurements
from spectrim.monitor.metrics import rank_of_spike

__all__ = ["KINDS", "read_stages"]

KINDS = ("gradient", "momentum")
"""Kinds of spectra whose spike is followed over training."""


def read_stages(file: Path, chosen: Sequence[ChosenMatrix], shapes: dict[str, tuple[int, int]]) -> list[dict[str, Any]]:
    """The exact spectra of the chosen matrices in a run's ``monitor.jsonl``, one entry for each step that has some.

    Args:
        file: need not be there.
        chosen: matrices; those of which the monitor wrote no spectrum are left out.
        shapes: of the matrices, by name.

    Raises:
        LabError: the file is not what a monitor writes.
    """
    stages = []
    try:
        for record in read_measurements(file):
            held, step = record.get("spectra") or {}, int(record["step"])
            if found := {
                each.name: of_kinds(held[each.name], shapes[each.name]) for each in chosen if each.name in held
            }:
                stages.append({"step": step, "matrices": found})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LabError(f"{str(file)!r} is not what a monitor writes: {error!r}") from None
    return stages


def of_kinds(spectra: dict[str, Any], shape: tuple[int, int]) -> dict[str, Any]:
    """Spectra and their spike shares, for the kinds that are complete."""
    rank, found = rank_of_spike(shape), {}
    for kind in KINDS:
        values = spectra.get(kind)
        if values and None not in values:
            squares = sorted((float(value) ** 2 for value in values), reverse=True)
            share = sum(squares[:rank]) / sum(squares) if sum(squares) > 0 else None
            found[kind] = {"spectrum": [float(value) for value in values], "spike_share": share}
    return found
