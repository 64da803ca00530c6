"""Recipes, learning rates by role and spectra for the Trainer of transformers and its subclasses, such as TRL's.

    trainer = Trainer(..., optimizer_cls_and_kwargs=(OptimizerFactory, {"name": "adamw+clip", "lr": 1e-3}))
    LearningRates(trainer)
    SpectralMonitor(trainer, every=100)

Both callbacks add their numbers to the Trainer's own log lines.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback

from spectrim import monitor
from spectrim.monitor.record import Record
from spectrim.monitor.sinks import Out
from spectrim.optim import SpectralOptimizer, create

__all__ = ["LearningRates", "OptimizerFactory", "SpectralMonitor"]


class OptimizerFactory:
    """Makes a recipe's optimizer from the Trainer's model, whose parameters it groups by role.

        Trainer(..., optimizer_cls_and_kwargs=(OptimizerFactory, {"name": "adamw+clip", "lr": 1e-3}))

    The keywords are those of :func:`spectrim.create`. The Trainer's own arguments for the optimizer (``optim``,
    ``learning_rate``, ``weight_decay``, ...) are ignored.

    A checkpoint of a run with ``optim="adamw_torch"`` loads: parameters get their moments by name, and
    :class:`LearningRates` or :class:`SpectralMonitor` adapts its scheduler.
    """

    def __call__(self, model: nn.Module, *, name: str, lr: float | Tensor, **options: Any) -> SpectralOptimizer:
        """The optimizer; see :func:`spectrim.create` for arguments and errors."""
        optimizer = create(name, model, lr=lr, **options)
        optimizer.register_load_state_dict_pre_hook(_names_for(model))
        return optimizer


def _names_for(model: nn.Module) -> Callable[[Any, dict[str, Any]], dict[str, Any] | None]:
    """A hook that adds names to a state dict of the Trainer's own optimizers, which have two groups: with and without
    decay, each in the model's order."""
    trainer: Any = Trainer
    decayed = frozenset(trainer.get_decay_parameter_names(None, model))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    names = [[name for name in trained if (name in decayed) is decays] for decays in (True, False)]

    def name_parameters(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        groups = state_dict["param_groups"]
        if any("param_names" in group or "recipe" in group for group in groups):
            return None
        if [len(group["params"]) for group in groups] != [len(group) for group in names]:
            return None
        warnings.warn(
            "moments, learning rates and weight decay are those of a checkpoint of the Trainer's own AdamW, as is the "
            "scheduler, which has no rate for each role: LearningRates(trainer) or SpectralMonitor(trainer) adapts it",
            stacklevel=2,
        )
        return {**state_dict, "param_groups": [{**g, "param_names": n} for g, n in zip(groups, names, strict=True)]}

    return name_parameters


class _InLogs(TrainerCallback):
    """A callback that adds numbers to the Trainer's log lines of training steps.

    It adds itself to the Trainer's callbacks, after the one that decides when to log and before those that report.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        callbacks = trainer.callback_handler.callbacks
        if any(type(callback) is type(self) for callback in callbacks):
            raise ValueError(f"the trainer has a {type(self).__name__} already: expected one")
        flow = [index for index, callback in enumerate(callbacks) if isinstance(callback, DefaultFlowCallback)]
        callbacks.insert(flow[0] + 1 if flow else 0, self)

    def numbers(self) -> dict[str, float]:
        """The numbers of the last step's log line."""
        raise NotImplementedError

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Adapt a scheduler that was loaded from a run with other groups, such as one with ``adamw_torch``."""
        if self._trainer.callback_handler.callbacks.count(self) > 1:
            raise ValueError(f"{type(self).__name__} was added twice: it adds itself, leave out add_callback")
        _fit_scheduler(kwargs["lr_scheduler"], kwargs["optimizer"].param_groups)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the numbers to lines of training steps, not to those of evaluation or of the end."""
        if logs is not None and "learning_rate" in logs:
            numbers = self.numbers()
            logs |= numbers
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1] |= numbers


def _fit_scheduler(scheduler: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Give the scheduler one rate for each group if it has another number of rates."""
    if len(getattr(scheduler, "base_lrs", groups)) != len(groups):
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        scheduler._last_lr = [group["lr"] for group in groups]
    if len(getattr(scheduler, "min_lrs", groups)) != len(groups):
        scheduler.min_lrs = [min(scheduler.min_lrs)] * len(groups)


class LearningRates(_InLogs):
    """Logs the learning rate of every role: "learning_rate/matrix", "learning_rate/embedding" and so on.

        LearningRates(trainer)

    If a role's groups were made with different rates, each rate has a number: "learning_rate/matrix/0". The rates are
    those of the logged step.

    Args:
        trainer: any Trainer of transformers. The callback adds itself.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self._rates: dict[str, float | Tensor] = {}

    def on_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        """Keep the rates of the step, before the scheduler changes them."""
        self._rates = _rates_by_role(kwargs["optimizer"].param_groups)

    def numbers(self) -> dict[str, float]:
        """The rates by role."""
        return {f"learning_rate/{role}": float(rate) for role, rate in self._rates.items()}


def _rates_by_role(groups: Iterable[Mapping[str, Any]]) -> dict[str, float | Tensor]:
    """The rate of each role, or several with numbers if its groups were made with different rates."""
    found: dict[str, dict[float, float | Tensor]] = {}
    for index, group in enumerate(groups):
        made_with = float(group.get("first_lr", group.get("initial_lr", 0.0)))
        lr = group["lr"]
        # Schedulers write into tensors.
        rate = lr.clone() if isinstance(lr, Tensor) else lr
        found.setdefault(group.get("role") or f"group_{index}", {}).setdefault(made_with, rate)
    return {
        role if len(rates) == 1 else f"{role}/{number}": rate
        for role, rates in found.items()
        for number, rate in enumerate(rates.values())
    }


#: The key of the monitor's state in ``trainer_state.json``. No class has this name: the Trainer would make a new
#: callback of such a class when it restores callbacks.
_STATE = "spectrim.SpectralMonitor"


class SpectralMonitor(_InLogs):
    """Measures spectra of gradients, updates and weights, and logs them with the Trainer.

        SpectralMonitor(trainer, every=100)

    Every measured step has a log line with the median of each metric over all matrices, such as
    "spectral/gradient_spike_share", and the metrics of matrices in ``names`` as "spectral/NAME/gradient_spike_share".
    A resumed run continues trends, counts and files. See :class:`spectrim.SpectralMonitor` for the metrics.

    Args:
        trainer: any Trainer of transformers. The callback adds itself.
        every: optimizer steps between measurements.
        out: further outputs of whole records, such as a path of JSON lines.
        names: patterns of matrices whose metrics are logged one by one.
        options: further options of :class:`spectrim.SpectralMonitor`, checked when training begins.
    """

    def __init__(
        self,
        trainer: Trainer,
        every: int = 100,
        *,
        out: Out | Iterable[Out] | None = None,
        names: str | Sequence[str] = (),
        **options: Any,
    ) -> None:
        super().__init__(trainer)
        self._every, self._out, self._options = every, out, options
        self._patterns = (names,) if isinstance(names, str) else tuple(names)
        self._records: list[Record] = []
        self.monitor: monitor.SpectralMonitor | None = None
        """The monitor, while the Trainer trains."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the optimizer, with the state of a checkpoint if there is one."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.monitor is not None:
            self.monitor.close()
        self._records.clear()
        scaler = self._trainer.accelerator.scaler
        saved = state.stateful_callbacks.get(_STATE)
        self.monitor = monitor.SpectralMonitor(
            kwargs["model"],
            kwargs["optimizer"],
            self._every,
            out=[self._records.append, *(() if self._out is None else (self._out,))],
            loss_scale=None if scaler is None else scaler.get_scale,
            steps_taken=state.global_step,
            resume=saved,
            **self._options,
        )
        state.stateful_callbacks[_STATE] = self.monitor.state_dict()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a log line if the step was measured, and update the state that a checkpoint will save.

        All ranks decide the same.
        """
        assert self.monitor is not None
        saved, step = state.stateful_callbacks[_STATE], self.monitor.steps_taken
        measured = step > saved["steps_taken"] and self.monitor.is_measured(step)
        # A checkpoint that another callback asks for has at least the count of steps.
        saved["steps_taken"] = step
        # An evaluation may decide that this step is the best one, to be saved.
        if control.should_save or (args.save_strategy == "best" and control.should_evaluate):
            saved |= self.monitor.state_dict()
        elif measured or control.should_training_stop:
            self.monitor.flush()
        control.should_log |= measured

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update the state for the checkpoint of an epoch."""
        if self.monitor is not None and (control.should_save or args.save_strategy == "best"):
            state.stateful_callbacks[_STATE] |= self.monitor.state_dict()

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        """Detach from the optimizer and close the files."""
        if self.monitor is not None:
            self.monitor.close()
            self.monitor = None

    def numbers(self) -> dict[str, float]:
        """Medians over matrices of the metrics since the last line, and the number of alarms."""
        records, self._records[:] = list(self._records), []
        numbers: dict[str, float] = {}
        for record in records:
            if record["parameters"]:
                numbers |= self._measured(record)
        alarms = sum(len(record.get("alarms", ())) for record in records)
        return {f"spectral/{key}": value for key, value in numbers.items()} | (
            {"spectral/alarms": float(alarms)} if alarms or numbers else {}
        )

    def _measured(self, record: Record) -> dict[str, float]:
        """The numbers of one measurement."""
        values: dict[str, list[float]] = {}
        numbers: dict[str, float] = {"step": record["step"], "skipped": record["skipped"], "ms": record["ms"]}
        for name, entry in record["parameters"].items():
            asked_for = any(fnmatchcase(name, pattern) for pattern in self._patterns)
            for quantity, value in entry.items():
                if value is None or quantity == "skipped":
                    continue
                values.setdefault(quantity, []).append(value)
                if asked_for:
                    numbers[f"{name}/{quantity}"] = value
        return {quantity: statistics.median(found) for quantity, found in values.items()} | numbers
