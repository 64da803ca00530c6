"""Writes a run's settings and monitor records to TensorBoard, under tags that it groups.

TensorBoard groups charts by the part of a tag before its first slash, in alphabetical order: after losses and gradients
come the largest values of the whole model, then a group a matrix, layer by layer.
"""

from spectrim.lab.config import TrainConfig
from spectrim.lab.logging.event_files import EventFile
from spectrim.lab.logging.monitor_log import MonitorRecord, short_names, values_in_layers
from spectrim.lab.models.architecture import name_of

__all__ = ["describe", "measured_scalars"]

METRICS = {"loss/validation": "validation loss", "loss/train": "training loss"}
"""Metrics whose last value TensorBoard shows beside the hyperparameters."""

FIRST = ("recipe", "seed", "lr", "clip_bound", "model")
"""Settings that most often tell runs apart."""

WORDS = ("recipe", "model", "precision", "schedule", "scale", "shrink_form", "clip_form", "clip_scope", "arguments")
SWITCHES = ("nesterov",)


def describe(events: EventFile, config: TrainConfig) -> None:
    """Write the settings of a run: as a text, and the main ones as hyperparameters."""
    events.add_text("configuration", "\n".join(f"    {line}" for line in config.to_toml().splitlines()), 0)
    values = hyperparameters(config)
    columns = {name: str if name in WORDS else bool if name in SWITCHES else float for name in values}
    known = {name: value for name, value in values.items() if value is not None}
    events.add_hyperparameters(known, columns=columns, first=FIRST, metrics=METRICS)


def hyperparameters(config: TrainConfig) -> dict[str, str | float | bool | None]:
    """The settings that tell runs apart; an unset one is None."""
    model, optimizer = config.model, config.optimizer.model_dump(mode="json")
    arguments = ", ".join(f"{key}={value}" for key, value in optimizer.pop("arguments").items())
    return {
        "recipe": config.recipe,
        "seed": config.seed,
        "steps": config.steps,
        "model": name_of(model.model_dump()),
        "batch_size": config.data.batch_size,
        "sequence_length": config.data.sequence_length,
        "precision": config.precision,
        "schedule": config.schedule.shape,
        "warmup_fraction": config.schedule.warmup_fraction,
        **optimizer,
        "arguments": arguments or None,
    }


def measured_scalars(record: MonitorRecord) -> dict[str, float]:
    """The numbers of a record by their tags, such as "spectra · layer 00 · mlp.up_proj/gradient stable rank"."""
    parameters = record["parameters"]
    scalars: dict[str, float] = {"monitor/skipped steps": record["skipped"]}
    if not parameters:
        return scalars
    scalars["monitor/time in ms"] = record["ms"]
    names = short_names(parameters, digits=2)
    for name, values in parameters.items():
        for key, value in values.items():
            if value is not None:
                scalars[f"spectra · {names[name]}/{key.replace('_', ' ')}"] = value
    for key in LARGEST:
        if known := values_in_layers(record, key):
            scalars[f"spectra/largest {key.replace('_', ' ')}"] = max(known)
    return scalars


LARGEST = ("update_to_weight", "update_spectral_norm", "gradient_spectral_norm", "weight_spectral_norm")
"""Quantities whose largest value, over all matrices in layers, has a chart of its own."""
