"""What TensorBoard shows of a run beside its log: settings, and what the monitor measured, under tags that it groups.

TensorBoard groups charts by what stands before a tag's first slash, in alphabetical order: a group a matrix, by layer,
and one for the whole model.
"""

from collections.abc import Mapping
from typing import Any

from spectrim.lab.config import TrainConfig
from spectrim.lab.events import EventFile
from spectrim.lab.measurements import Measurement, layer_of, short_names

__all__ = ["describe", "measured_scalars"]

METRICS = {"loss/validation": "validation loss", "loss/train": "training loss"}
"""That stand beside the hyperparameters, by their last value: at the end of a run the final loss."""


def describe(events: EventFile, config: TrainConfig) -> None:
    """Write the settings of a run: as a text, and the main ones as hyperparameters."""
    events.add_text("configuration", "\n".join(f"    {line}" for line in config.to_toml().splitlines()), 0)
    events.add_hyperparameters(hyperparameters(config), metrics=METRICS)


def hyperparameters(config: TrainConfig) -> dict[str, str | float | bool]:
    """What runs are told apart by; values that are not set are left out."""
    model, optimizer = config.model, config.optimizer.model_dump(mode="json")
    arguments: Mapping[str, Any] = optimizer.pop("arguments")
    values = {
        "recipe": config.recipe,
        "seed": config.seed,
        "steps": config.steps,
        "model": model.weights or model.architecture or model.preset,
        "batch_size": config.data.batch_size,
        "sequence_length": config.data.sequence_length,
        "precision": config.precision,
        "schedule": config.schedule.shape,
        "warmup_fraction": config.schedule.warmup_fraction,
        **optimizer,
        **{f"arguments.{key}": value for key, value in arguments.items()},
    }
    return {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in values.items()
        if value is not None
    }


def measured_scalars(record: Measurement) -> dict[str, float]:
    """The numbers of a monitor's record by their tags, such as "layer 00 · mlp.up_proj/gradient stable rank"."""
    parameters = record["parameters"]
    scalars: dict[str, float] = {"monitor/skipped steps": record["skipped"]}
    if not parameters:
        return scalars
    scalars["monitor/time in ms"] = record["ms"]
    names = short_names(parameters, digits=2)
    for name, values in parameters.items():
        for key, value in values.items():
            if value is not None:
                scalars[f"{names[name]}/{key.replace('_', ' ')}"] = value
    inside = [name for name in parameters if layer_of(name)[0] is not None] or list(parameters)
    for key in LARGEST:
        known = [value for name in inside if (value := parameters[name].get(key)) is not None]
        if known:
            scalars[f"largest of all matrices/{key.replace('_', ' ')}"] = max(known)
    return scalars


LARGEST = ("update_to_weight", "update_spectral_norm", "gradient_spectral_norm", "weight_spectral_norm")
"""Quantities whose largest value, over all matrices in layers, has a chart of its own."""
