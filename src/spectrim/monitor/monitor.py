"""SpectralMonitor: what the spectra of gradients, updates and weights do while a model trains.

It is attached by hooks alone and only looks. A measurement spans one step: gradient norms as gradients are accumulated,
gradients and a copy of the weights just before the optimizer's step, updates and weights just after. Relies on
:mod:`measurement` for the numbers, :mod:`watch` for what is known of every step, :mod:`sinks` for where it goes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.optim import Optimizer

from spectrim.monitor.alarm import Alarm, Rule, alerts_of
from spectrim.monitor.board import Found, on_host
from spectrim.monitor.inner_step import is_inner_step
from spectrim.monitor.measurement import Measurement, Wanted, squared_norms
from spectrim.monitor.metrics import RANK_RATIO
from spectrim.monitor.record import Alert, Record, entry_of, rounded, spectra_of
from spectrim.monitor.sinks import Out, sinks_of
from spectrim.monitor.skips import Skips
from spectrim.monitor.subjects import Subject, subjects_of
from spectrim.monitor.watch import Watch

__all__ = ["KINDS", "SpectralMonitor"]

KINDS = ("gradient", "momentum", "update", "weight")
#: Steps after which what is known of every step is read from the device.
WATCH_EVERY = 10

logger = logging.getLogger("spectrim.monitor")


class SpectralMonitor:
    """Measure gradients, updates and weights of every matrix of a model, every so many steps of its optimizer.

        monitor = spectrim.SpectralMonitor(model, optimizer, every=100)

    Nothing else changes in the training loop, and nothing in training: no random number is drawn, no weight, gradient
    or state is written to. Works with any ``torch.optim.Optimizer``; parameters may be sharded by FSDP2 or tensor
    parallelism. Then every rank makes a monitor, and the first one alone writes.

    Args:
        model: whose parameters' names are used. Wrappers around it are looked through.
        optimizer: whose steps are counted and whose parameters are watched.
        every: steps between measurements.
        out: where records go: a path of JSON lines, a sink, several of them, or None.
        exact_every: steps between exact measurements, which hold all singular values.
        exact_steps: further steps that are measured exactly.
        exact: patterns of the names that are measured exactly then.
        kinds: of matrices to measure: "gradient", "momentum" (its singular values only, on exact steps), "update",
            "weight".
        rank_ratio: the share of directions that are called the spike.
        alarm: the rule that warns: an :class:`~spectrim.monitor.alarm.Alarm`, any callable like it, or None.
        loss_scale: what losses are multiplied by before the backward pass, such as ``scaler.get_scale``; metrics are of
            gradients without it.
        steps_taken: steps that the optimizer has taken before.

    Raises:
        ValueError: a value that is not allowed, or a pattern that matches nothing; the message names it.
        FileExistsError: the file has records already, see :class:`~spectrim.monitor.sinks.JsonLines`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        every: int = 100,
        *,
        out: Out | Iterable[Out] | None = "monitor.jsonl",
        exact_every: int | None = None,
        exact_steps: Collection[int] = (),
        exact: str | Sequence[str] = "*",
        kinds: Collection[str] = KINDS,
        rank_ratio: float = RANK_RATIO,
        alarm: Rule | Literal["default"] | None = "default",
        loss_scale: Callable[[], float] | None = None,
        steps_taken: int = 0,
    ) -> None:
        _check("every", every, 1)
        _check("steps_taken", steps_taken, 0)
        if exact_every is not None:
            _check("exact_every", exact_every, 1)
        kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        for kind in kinds:
            if kind not in KINDS:
                raise ValueError(f"kind {kind!r}: expected some of {', '.join(map(repr, KINDS))}")
        if not 0 < rank_ratio <= 1:
            raise ValueError(f"rank_ratio={rank_ratio!r}: expected a share above 0, at most 1")
        if alarm is not None and alarm != "default" and not callable(alarm):
            raise ValueError(f"alarm={alarm!r}: expected a callable, None or 'default'")
        optimizer = _innermost(optimizer)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"cannot watch a {type(optimizer).__name__}: expected a torch.optim.Optimizer")
        self.every, self.exact_every = every, exact_every
        self.exact_steps = frozenset(exact_steps)
        self.kinds, self.rank_ratio = kinds, rank_ratio
        self.alarm: Rule | None = Alarm() if alarm == "default" else alarm
        self.steps_taken = steps_taken
        self.milliseconds = 0.0
        """What the monitor took so far, in all."""
        self.last: Record | None = None
        """The last record, on the process that writes."""
        self._model, self._optimizer, self._loss_scale = model, optimizer, loss_scale
        self._patterns = [exact] if isinstance(exact, str) else list(exact)
        self._skips = Skips(optimizer)
        self._norms: dict[Subject, Tensor] = {}
        self._reduced_later: list[Subject] = []
        self._measurement: Measurement | None = None
        self._told = 0.0
        self._held: list[tuple[Tensor, bool]] = []
        self._gradient_hooks: list[Any] = []
        self._step_hooks: list[Any] = []
        self.writes = _first()
        """Whether this process is the one that writes."""
        self._subjects = subjects_of(model, optimizer.param_groups)
        for pattern in self._patterns:
            # All that there is may be nothing: an optimizer of vectors alone.
            if pattern != "*" and not any(fnmatchcase(name, pattern) for name in self.names):
                raise ValueError(f"exact pattern {pattern!r} matches no matrix: expected some of {_some(self.names)}")
        self._sinks = sinks_of(out) if self.writes else []
        # From here on nothing fails, so that no hook is left of a monitor that was not made.
        self._bind()
        self._step_hooks.append(optimizer.register_step_pre_hook(_untraced(self._before_step)))
        self._step_hooks.append(optimizer.register_step_post_hook(_untraced(self._after_step)))

    @property
    def names(self) -> list[str]:
        """The names of all matrices that are watched."""
        return [name for subject in self._subjects for name in subject.names]

    # -- State ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Steps, skips and trends as plain values, for a checkpoint; on ranks of sharded parameters, called by all."""
        self._read_watch()
        rule: Any = self.alarm
        alarm = rule.state_dict() if hasattr(rule, "state_dict") else None
        return {"steps_taken": self.steps_taken, "skips": self._skips.state_dict(), "alarm": alarm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was called."""
        self.steps_taken = int(state["steps_taken"])
        self._skips.load_state_dict(state["skips"])
        rule: Any = self.alarm
        if state["alarm"] is not None and hasattr(rule, "load_state_dict"):
            rule.load_state_dict(state["alarm"])

    def close(self) -> None:
        """Remove all hooks and close the sinks; ranks of sharded parameters do so together. Safe to call again."""
        if not self._step_hooks:
            return
        self._read_watch()
        for hook in (*self._step_hooks, *self._gradient_hooks):
            hook.remove()
        self._step_hooks, self._gradient_hooks = [], []
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> SpectralMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            # After a failure ranks may not meet any more, and what was not read is lost with the step.
            self._watch = Watch([])
        self.close()

    # -- Hooks ---------------------------------------------------------------------------------------------------------

    def _bind(self) -> None:
        """Find what there is to watch, anew where the optimizer's parameters are others than before."""
        held = [(p, p.requires_grad) for group in self._optimizer.param_groups for p in group["params"]]
        if len(held) == len(self._held) and all(
            p is q and a == b for (p, a), (q, b) in zip(held, self._held, strict=True)
        ):
            return
        if self._held:
            self._read_watch()
        self._held = held
        self._subjects = subjects_of(self._model, self._optimizer.param_groups)
        self._skips.names = {subject.position: subject.name for subject in self._subjects}
        names = self.names
        exact = {name for name in names if any(fnmatchcase(name, pattern) for pattern in self._patterns)}
        self._exact = exact
        mine = [subject for subject in self._subjects if subject.team is not None or _first()]
        self._mine = mine
        self._watch = Watch(mine if self.alarm is not None else [])
        for hook in self._gradient_hooks:
            hook.remove()
        self._gradient_hooks = []
        self._norms.clear()
        if "gradient" in self.kinds:
            for subject in mine:
                parameter: Any = subject.parameter
                hook = parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, subject))
                self._gradient_hooks.append(hook)

    def _is_measured(self, step: int) -> bool:
        return step % self.every == 0 or self._is_exact(step)

    def _is_exact(self, step: int) -> bool:
        return step in self.exact_steps or (self.exact_every is not None and step % self.exact_every == 0)

    @torch.no_grad()
    def _on_gradient(self, subject: Subject, _: Tensor) -> None:
        """A gradient was accumulated: on a sampled step its norm is kept, that of the last micro-batch in the end."""
        if not self._is_measured(self.steps_taken + 1):
            return
        if subject.team is None and _distributed():
            # Data parallelism sums gradients after this, at the end of the backward pass.
            if not self._reduced_later:
                engine = Variable._execution_engine
                engine.queue_callback(lambda: engine.queue_callback(self._on_reduced))
            self._reduced_later.append(subject)
            return
        self._norms[subject] = self._norm(subject)

    @torch.no_grad()
    def _on_reduced(self) -> None:
        for subject in self._reduced_later:
            self._norms[subject] = self._norm(subject)
        self._reduced_later.clear()

    def _norm(self, subject: Subject) -> Tensor:
        start = time.perf_counter()
        assert subject.parameter.grad is not None
        norm = squared_norms(subject, subject.parameter.grad)
        self._spend(start)
        return norm

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_inner_step(optimizer):
            return
        start = time.perf_counter()
        self._bind()
        step = self.steps_taken + 1
        self._watch.before()
        self._measurement = None
        if self._is_measured(step):
            exact = self._exact if self._is_exact(step) else frozenset[str]()
            scale = 1.0 if self._loss_scale is None else float(self._loss_scale())
            wanted = Wanted(kinds=self.kinds, exact=exact, rank_ratio=self.rank_ratio, loss_scale=scale)
            self._measurement = Measurement(self._mine, optimizer, wanted, self._norms)
            # A closure makes the gradients that its step uses.
            self._closure = any(value is not None for value in (*args[1:], kwargs.get("closure")))
            if not self._closure:
                self._measurement.take_gradients()
            self._measurement.take_weights()
        self._spend(start)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_inner_step(optimizer):
            return
        start = time.perf_counter()
        step = self.steps_taken = self.steps_taken + 1
        self._watch.after(step, optimizer.param_groups)
        measurement, self._measurement = self._measurement, None
        if measurement is None:
            if len(self._watch) >= WATCH_EVERY:
                self._read_watch()
            self._spend(start)
            return
        if self._closure:
            measurement.take_gradients()
        measurement.take_step()
        self._norms.clear()
        parts = [measurement.tensors(), self._watch.tensors(), self._skips.tensors()]
        # All that this step needs of the device, in one read.
        hosts = iter(on_host([tensor for part in parts for tensor in part]))
        numbers, watched, skips = ([next(hosts) for _ in part] for part in parts)
        found = measurement.read(numbers)
        *earlier, now = self._watch.read(watched) or [(step, {})]
        self._warn(earlier)
        record = self._record(step, found, self._skips.counts(found, skips))
        if self.alarm is not None:
            known = {name: {**entry, **now[1].get(name, {})} for name, entry in record["parameters"].items()}
            alerts = self._alerts(step, {**now[1], **known})
            if alerts:
                record["alarms"] = alerts
        self._spend(start)
        record["ms"], self._told = rounded(self.milliseconds - self._told) or 0.0, self.milliseconds
        self._send(record)

    def _spend(self, start: float) -> None:
        self.milliseconds += 1000 * (time.perf_counter() - start)

    # -- Records -------------------------------------------------------------------------------------------------------

    def _record(self, step: int, found: Sequence[Found], counts: Mapping[str, int]) -> Record:
        record: Record = {
            "step": step,
            "skipped": sum(counts.values()),
            "parameters": {part.name: entry_of(part, counts.get(part.subject.name, 0)) for part in found},
            "ms": 0.0,
        }
        spectra = {part.name: spectra for part in found if (spectra := spectra_of(part))}
        if spectra:
            record["spectra"] = spectra
        return record

    def _read_watch(self) -> None:
        self._warn(self._watch.read(on_host(self._watch.tensors())))

    def _warn(self, steps: Iterable[tuple[int, Mapping[str, Mapping[str, float | None]]]]) -> None:
        """Records of the steps, between measurements, that the rule warns of."""
        for step, values in steps:
            alerts = self._alerts(step, values)
            if alerts:
                self._send({"step": step, "skipped": self._skips.total, "parameters": {}, "alarms": alerts, "ms": 0.0})

    def _alerts(self, step: int, values: Mapping[str, Mapping[str, float | None]]) -> list[Alert]:
        alerts = [] if self.alarm is None else alerts_of(self.alarm, step, values)
        for alert in alerts if self.writes else ():
            logger.warning("%s", alert["message"])
        return alerts

    def _send(self, record: Record) -> None:
        if not self.writes:
            return
        self.last = record
        for sink in self._sinks:
            sink(record)


def _untraced(hook: Callable[..., None]) -> Callable[..., None]:
    """The hook, left out of a step that is compiled. Decided as it runs: asking before would import the compiler."""

    def run(*arguments: Any) -> None:
        if torch.compiler.is_compiling():
            compiler: Any = torch.compiler
            compiler.disable(hook)(*arguments)
        else:
            hook(*arguments)

    return run


def _innermost(optimizer: Any) -> Any:
    """The optimizer that takes the steps: the one inside of wrappers such as accelerate's, whose hooks never run."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def _check(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}")


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _first() -> bool:
    return not _distributed() or dist.get_rank() == 0


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(map(repr, names[:limit])) + (", ..." if len(names) > limit else "")
