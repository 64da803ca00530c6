"""The spectra of trained models: weights, gradients, momentum and noise, from a run, a checkpoint or weights plus text.

:func:`spectrum` measures; :func:`write_spectrum` writes numbers, pictures, a reading and a page into a new folder. A
result is a function of the inputs and the options.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from spectrim.lab.data.batches import Batches
from spectrim.lab.diagnosis.gradients import GradientSource
from spectrim.lab.diagnosis.matrices import ChosenMatrix, choose
from spectrim.lab.diagnosis.numbers import gradient_numbers, matrix_numbers, plain
from spectrim.lab.diagnosis.settings import SpectrumConfig
from spectrim.lab.diagnosis.stages import read_stages
from spectrim.lab.diagnosis.targets import LoadedTarget, SpectrumTarget, find_targets
from spectrim.lab.errors import LabError
from spectrim.lab.files import write_folder_atomically, write_json, write_text
from spectrim.lab.training.device import choose_device, environment
from spectrim.lab.training.run_statistics import weight_norm
from spectrim.monitor.gradient_stacks import FEWEST_BATCHES
from spectrim.monitor.metrics import rank_of_spike

__all__ = [
    "NUMBERS",
    "READING",
    "ProgressListener",
    "check_out",
    "default_out",
    "spectrum",
    "write_spectrum",
]

NUMBERS = "spectrum.json"
READING = "reading.md"


class ProgressListener(Protocol):
    """Callbacks about the progress of an analysis."""

    def subject_started(self, name: str, batches: int, matrices: int) -> None:
        """The measurement of a model begins, with these numbers of batches and matrices."""

    def batch_done(self) -> None:
        """One more batch has been run."""

    def matrix_done(self) -> None:
        """One more matrix has been analysed."""


def spectrum(
    paths: Sequence[Path],
    options: SpectrumConfig,
    *,
    cache_dir: Path | None = None,
    listener: ProgressListener | None = None,
) -> dict[str, Any]:
    """Measure weights, gradients and noise of everything at these paths.

    Args:
        paths: folders of runs, of comparisons, or of Hugging Face weights, and checkpoints of runs.
        options: how.
        cache_dir: where tokens are cached.
        listener: told about progress.

    Returns:
        What ``spectrum.json`` holds; docs/spectrum.md describes it.

    Raises:
        LabError: a path or an option is invalid.
    """
    if 0 < options.batches < FEWEST_BATCHES:
        raise LabError(f"--batches {options.batches}: noise needs at least {FEWEST_BATCHES}, 0 shows weights alone")
    subjects = find_targets(paths)
    measured = {
        subject.name: measure_subject(subject, options, cache_dir=cache_dir, listener=listener) for subject in subjects
    }
    return {
        "kind": "spectrum",
        "subjects": measured,
        "config": {
            "paths": [str(path) for path in paths],
            "batches": options.batches,
            "layers": list(options.layers),
            "parameters": list(options.parameters),
            "thresholds": list(options.thresholds),
            "seed": options.seed,
            "data": list(options.data.sources),
        },
        "environment": environment(choose_device("auto")),
    }


def measure_subject(
    subject: SpectrumTarget, options: SpectrumConfig, *, cache_dir: Path | None, listener: ProgressListener | None
) -> dict[str, Any]:
    """Measure one model."""
    loaded = subject.load(options.data, with_text=options.batches > 0, cache_dir=cache_dir)
    chosen = choose(loaded.model, layers=options.layers, patterns=options.parameters)
    source = gradient_source(subject, loaded, chosen, options, listener) if options.batches else None
    if listener:
        batches = len(source.chunks) * options.batches if source else 0
        listener.subject_started(subject.name, batches, len(chosen))
    parameters = dict(loaded.model.named_parameters())
    matrices = {each.name: weight_numbers(each, parameters[each.parameter].detach(), loaded) for each in chosen}
    for each, gradients in source.stacks() if source else ((each, None) for each in chosen):
        if gradients is not None:
            matrices[each.name] |= gradient_numbers(gradients, options.thresholds) or {}
        if listener:
            listener.matrix_done()
    run = subject.run
    shapes = {name: tuple(matrix["shape"]) for name, matrix in matrices.items()}
    stages = read_stages(run.monitor_file, chosen, shapes) if run is not None else []
    if subject.kind == "checkpoint":
        stages = [stage for stage in stages if stage["step"] <= (subject.step or 0)]
    return {
        "path": str(subject.path),
        "kind": subject.kind,
        "recipe": subject.config.recipe if subject.config else None,
        "step": subject.step,
        "steps": subject.config.steps if subject.config else None,
        "weight_norm": weight_norm(loaded.model),
        "momentum": loaded.momentum,
        "text": None if source is None else text_numbers(loaded, source),
        "matrices": plain(matrices),
        "stages": plain(stages),
    }


def weight_numbers(matrix: ChosenMatrix, parameter: Tensor, loaded: LoadedTarget) -> dict[str, Any]:
    """The place of a matrix in the model, and the statistics of its weights and momentum."""
    weight, momentum = matrix.read(parameter), loaded.momenta.get(matrix.parameter)
    m, n = weight.shape
    return {
        "kind": matrix.kind,
        "layer": matrix.layer,
        "role": matrix.role,
        "shape": [m, n],
        "spike_rank": rank_of_spike((m, n)),
        "weight": matrix_numbers(weight),
        "momentum": None if momentum is None else matrix_numbers(matrix.read(momentum)),
    }


def gradient_source(
    subject: SpectrumTarget,
    loaded: LoadedTarget,
    chosen: Sequence[ChosenMatrix],
    options: SpectrumConfig,
    listener: ProgressListener | None,
) -> GradientSource:
    assert loaded.tokens is not None
    config = subject.config
    own = config.seed if config else 0
    data = loaded.data
    # Start where training stopped: the model has not seen those batches.
    first = (subject.step or 0) if options.seed is None else 0
    batches = Batches(
        loaded.tokens.train,
        seed=own if options.seed is None else options.seed,
        batch_size=data.batch_size,
        sequence_length=data.sequence_length,
    )
    return GradientSource(
        model=loaded.model,
        chosen=chosen,
        batches=batches,
        steps=range(first, first + options.batches),
        memory=1e9 * options.memory,
        device=torch.device(choose_device(config.device if config else "auto")),
        precision=config.precision if config else "float32",
        accumulate=config.accumulate if config and data.batch_size % config.accumulate == 0 else 1,
        on_batch=listener.batch_done if listener else lambda: None,
    )


def text_numbers(loaded: LoadedTarget, source: GradientSource) -> dict[str, Any]:
    """The batches that were run, and whether any of them repeats."""
    windows = sum(source.batches.windows)
    return {
        "batches": len(source.steps),
        "first_batch": source.steps.start,
        "batch_size": loaded.data.batch_size,
        "sequence_length": loaded.data.sequence_length,
        "seed": source.batches.seed,
        "windows": windows,
        "repeated": len(source.steps) * loaded.data.batch_size > windows,
    }


def default_out(paths: Sequence[Path]) -> Path:
    """The default output folder, next to the only path.

    Raises:
        LabError: there are several.
    """
    if len(paths) > 1:
        raise LabError("--out is missing: name the folder that is to hold the spectra of all of them")
    path = paths[0].absolute()
    if path.name.startswith("step-") and path.parent.name == "checkpoints":
        # Beside the run, not inside of its checkpoints.
        run = path.parent.parent
        return run.with_name(f"{run.name}-{path.stem}-spectrum")
    return path.with_name(f"{path.name}-spectrum")


def check_out(out: Path) -> None:
    """Check that the output folder is new or empty.

    Raises:
        LabError: the folder is a file, or holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LabError(f"--out {str(out)!r} exists and is not empty; choose another name")


def write_spectrum(summary: dict[str, Any], out: Path) -> None:
    """Write numbers, pictures, reading and page into a new folder, all of it or nothing.

    Raises:
        LabError: the folder holds something.
    """
    from spectrim.lab.reports.page.sections import Study
    from spectrim.lab.reports.spectra.pictures import save_pictures
    from spectrim.lab.reports.spectra.spectrum_page import reading_text
    from spectrim.lab.reports.study import PAGE, report

    check_out(out)

    def fill(folder: Path) -> None:
        write_json(folder / NUMBERS, summary)
        save_pictures(summary, folder)
        write_text(folder / READING, reading_text(Study(kind="spectrum", folder=out, summary=summary)))

    write_folder_atomically(out, fill)
    report([out], out / PAGE)
