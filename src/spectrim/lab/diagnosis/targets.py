"""The targets of ``spectrim spectrum``: a training run, a checkpoint, or a Hugging Face folder of weights.

Each becomes a :class:`SpectrumTarget`: a model with its weights, the optimizer's momentum if it is stored, and the
text for gradients. The folders are only read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from spectrim.lab.config import DataConfig, ModelConfig, TrainConfig
from spectrim.lab.data.tokens import Tokens, prepare_tokens, resolve_data
from spectrim.lab.diagnosis.settings import TextConfig
from spectrim.lab.errors import LabError
from spectrim.lab.models.build import build_model
from spectrim.lab.recipes.names import parse_recipe
from spectrim.lab.settings import read_toml
from spectrim.lab.training import checkpoints
from spectrim.lab.training.folder import RunFolder

__all__ = ["LoadedTarget", "SpectrumTarget", "find_targets"]

MOMENTA = ("exp_avg", "momentum_buffer")
"""State keys of a moving average of gradients."""


@dataclass(frozen=True, kw_only=True)
class LoadedTarget:
    """A subject in memory."""

    model: nn.Module
    tokens: Tokens | None
    data: DataConfig
    momenta: dict[str, Tensor] = field(default_factory=dict)
    """The moving average of every parameter's gradients."""
    momentum: str | None = None
    """Their state key."""


@dataclass(frozen=True, kw_only=True)
class SpectrumTarget:
    """A run, a checkpoint or a folder of weights."""

    name: str
    path: Path
    kind: Literal["run", "checkpoint", "model"]
    config: TrainConfig | None = None
    """The run's configuration; None for a folder of weights."""
    checkpoint: Path | None = None
    step: int | None = None

    @property
    def run(self) -> RunFolder | None:
        """The run's folder, if there is one."""
        if self.kind == "run":
            return RunFolder(self.path)
        beside = self.path.parent.parent
        return RunFolder(beside) if self.kind == "checkpoint" and (beside / "config.toml").is_file() else None

    def load(self, text: TextConfig, *, with_text: bool, cache_dir: Path | None = None) -> LoadedTarget:
        """Load the model, its momentum and, unless only weights are measured, the tokens.

        Raises:
            LabError: there is no text for a folder of weights, or text, tokenizer and model do not fit each other.
        """
        folder = self._folder_of_weights()
        data = self._data(text, folder, with_text=with_text)
        tokens = prepare_tokens(data, cache_dir) if with_text or folder is None else None
        if folder is None:
            assert tokens is not None
            assert self.config is not None
            model = build_model(
                self.config.model,
                vocabulary_size=tokens.vocabulary_size,
                sequence_length=data.sequence_length,
                seed=self.config.seed,
                end_of_document=tokens.end,
                padded=tokens.padded,
            )
        else:
            size, length = (tokens.vocabulary_size, data.sequence_length) if tokens else (1, 2)
            weights = ModelConfig(weights=str(folder))
            model = build_model(weights, vocabulary_size=size, sequence_length=length, seed=0)
        momenta, key = restore_momenta(self.checkpoint, model) if self.checkpoint else ({}, None)
        return LoadedTarget(model=model, tokens=tokens, data=data, momenta=momenta, momentum=key)

    def _folder_of_weights(self) -> Path | None:
        """The Hugging Face folder: the target itself, or what its run has exported."""
        if self.kind == "model":
            return self.path
        run = self.run
        return run.model if run is not None and run.model.is_dir() else None

    def _data(self, text: TextConfig, folder: Path | None, *, with_text: bool) -> DataConfig:
        """The data of the run, or of ``text`` where that names others."""
        if self.config is None:
            if with_text and not text.sources:
                raise LabError(
                    f"{str(self.path)!r} is a model without text: name some by --data for its gradients, or give "
                    f"--batches 0 to see its weights alone"
                )
            data = text.over(DataConfig())
            return resolve_data(data, weights=str(self.path)) if with_text else data
        data = self.config.data
        if text.sources or text.tokenizer:
            if folder is None and text.tokenizer is None:
                raise LabError(
                    f"--data for {str(self.path)!r}: the run's tokenizer is in its model/, which is not there; give "
                    f"it by --tokenizer"
                )
            data = data.model_copy(update={"tokenizer": str(folder), "vocabulary_size": None})
        return resolve_data(text.over(data))


def restore_momenta(path: Path, model: nn.Module) -> tuple[dict[str, Tensor], str | None]:
    """Load a checkpoint into the model; returns the optimizer's momentum by parameter, and its state key."""
    try:
        weights, moments = checkpoints.read_parts(path, MOMENTA)
        model.load_state_dict(weights)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise LabError(f"checkpoint {str(path)!r} does not fit its run's model: {reason}") from error
    known = dict(model.named_parameters())
    for key in MOMENTA:
        if found := {name: kept[key] for name, kept in moments.items() if name in known and key in kept}:
            return found, key
    return {}, None


def find_targets(paths: Sequence[Path]) -> list[SpectrumTarget]:
    """Find the targets at the paths; a comparison gives the first seed of every recipe, and equal names get numbers.

    Raises:
        LabError: a path is no target, or a run in it has no checkpoint yet.
    """
    found = [subject for path in paths for subject in read_path(path)]
    counts: dict[str, int] = {}
    for subject in found:
        counts[subject.name] = counts.get(subject.name, 0) + 1
    named: dict[str, SpectrumTarget] = {}
    for subject in found:
        name = subject.name if counts[subject.name] == 1 else longer_name(subject)
        if name in named:
            raise LabError(f"{str(subject.path)!r} is given twice")
        named[name] = SpectrumTarget(**{**vars(subject), "name": name})
    return list(named.values())


def longer_name(subject: SpectrumTarget) -> str:
    place = subject.path.absolute()
    seed = "" if subject.config is None else f", seed {subject.config.seed}"
    step = f", step {subject.step}" if subject.kind == "checkpoint" else ""
    return f"{subject.name}{seed}{step} ({place.parent.name}/{place.name})"


def read_path(path: Path) -> list[SpectrumTarget]:
    if not path.exists():
        raise LabError(f"{str(path)!r} does not exist; expected {EXPECTED}")
    if path.name.startswith("step-") and (path.suffix == ".pt" or (path / "state.pt").is_file()):
        return [read_checkpoint(path)]
    if path.is_file():
        raise LabError(f"{str(path)!r} is no checkpoint of a run; expected {EXPECTED}")
    if (path / "config.toml").is_file():
        values = read_toml(path / "config.toml")
        if "recipes" in values and "space" not in values:
            return read_comparison(path, values)
        if "recipe" in values:
            return [read_run(path)]
    if (path / "config.json").is_file():
        return [SpectrumTarget(name=path.resolve().name, path=path, kind="model")]
    what = "a sweep: name its trials' folders" if (path / "results.json").is_file() else "none of these"
    raise LabError(f"{str(path)!r} is {what}; expected {EXPECTED}")


EXPECTED = (
    "the folder of a run (config.toml) or of a comparison, a checkpoint (step-N.pt) of a run, or a Hugging Face folder "
    "(config.json)"
)


def read_comparison(path: Path, values: dict[str, Any]) -> list[SpectrumTarget]:
    seed = values.get("seeds", [0])[0]
    return [read_run(path / parse_recipe(recipe).folder / f"seed-{seed}") for recipe in values["recipes"]]


def read_run(path: Path) -> SpectrumTarget:
    folder = RunFolder(path)
    config = folder.stored_config()
    if config is None:
        raise LabError(f"run {str(path)!r} has not been begun: it has no config.toml")
    kept = checkpoints.list_checkpoints(folder.checkpoints) if folder.checkpoints.is_dir() else []
    if not kept and not folder.model.is_dir():
        raise LabError(
            f"run {str(path)!r} is not finished and has no checkpoint yet: let it come to one, see checkpoint_every"
        )
    newest = kept[0] if kept else None
    step = checkpoints.step_of(newest) if newest else config.steps
    if newest is not None:
        open_checkpoint(newest)
    return SpectrumTarget(name=config.recipe, path=path, kind="run", config=config, checkpoint=newest, step=step)


def read_checkpoint(path: Path) -> SpectrumTarget:
    config = TrainConfig.parse(open_checkpoint(path)["config"], source=f"checkpoint {str(path)!r}")
    step = checkpoints.step_of(path)
    return SpectrumTarget(
        name=f"{config.recipe} at step {step}", path=path, kind="checkpoint", config=config, checkpoint=path, step=step
    )


def open_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        LabError: it is damaged or not spectrim's.
    """
    try:
        return checkpoints.open_whole(path)
    except MemoryError:
        raise
    except Exception as error:
        # What is no archive, or holds anything but plain values and tensors, may fail in any way.
        reason = str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise LabError(f"checkpoint {str(path)!r} cannot be read: {reason}") from None
