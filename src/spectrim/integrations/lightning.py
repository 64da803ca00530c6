"""Lightning: spectra of gradients, updates and weights in a Trainer's loggers.

    trainer = Trainer(callbacks=[SpectralMonitor(every=100), LearningRateMonitor()], ...)

The optimizer itself needs no adapter: ``return spectrim.create("adamw+clip", self, lr=...)`` in
``configure_optimizers``, whose groups are named by role.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl

from spectrim import monitor
from spectrim.monitor.record import Record
from spectrim.monitor.sinks import scalars

__all__ = ["SpectralMonitor"]


class SpectralMonitor(pl.Callback):
    """A :class:`spectrim.SpectralMonitor` on every optimizer of a Trainer, which writes to the Trainer's loggers.

    The Trainer's checkpoints have its state, so a resumed run continues its steps and trends.

    Args:
        every: optimizer steps between measurements.
        out: a further output of records; see :class:`spectrim.SpectralMonitor`.
        options: its other keywords, such as ``exact_every`` or ``kinds``.

    Raises:
        ValueError: when training starts, if an option is not allowed; the message names it.
    """

    def __init__(self, every: int = 100, *, out: Any = None, **options: Any) -> None:
        self._every, self._out, self._options = every, out, options
        self._monitors: list[monitor.SpectralMonitor] = []
        self._saved: list[dict[str, Any]] = []

    @property
    def monitors(self) -> list[monitor.SpectralMonitor]:
        """One for each optimizer, while the Trainer trains."""
        return self._monitors

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach a monitor to every optimizer."""
        count = len(trainer.optimizers)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        options = {**({} if scaler is None else {"loss_scale": scaler.get_scale}), **self._options}
        for index, optimizer in enumerate(trainer.optimizers):
            log: Any = partial(_log, trainer, "" if count == 1 else f"optimizer {index}/")
            out = [log] if self._out is None else [log, self._out]
            # A callback may serve one run after another.
            if self._saved and trainer.global_step:
                known: dict[str, Any] = {"resume": self._saved[index]}
            else:
                known = {"steps_taken": trainer.global_step // count}
            self._monitors.append(
                monitor.SpectralMonitor(pl_module, optimizer, self._every, out=out, **known, **options)
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the remaining records and detach."""
        self._saved = self._states()
        for one in self._monitors:
            one.close()
        self._monitors = []

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Detach, without waiting for other ranks."""
        for one in self._monitors:
            one.__exit__(type(exception), exception, exception.__traceback__)
        self._monitors = []

    def state_dict(self) -> dict[str, Any]:
        """Plain values for the Trainer's checkpoints. If parameters are sharded, all ranks call it."""
        return {"monitors": self._states()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint when training starts."""
        self._saved = state_dict["monitors"]

    def _states(self) -> list[dict[str, Any]]:
        return [one.state_dict() for one in self._monitors] or self._saved


def _log(trainer: pl.Trainer, prefix: str, record: Record) -> None:
    """Write a record's numbers to a Trainer's loggers."""
    numbers = {f"{prefix}{tag}": value for tag, value in scalars(record)}
    for logger in trainer.loggers:
        # The Trainer logs a step under the number of steps before it.
        logger.log_metrics(numbers, step=record["step"] - 1)
