"""SpectralMonitor: what the spectra of gradients, updates and weights do while a model trains.

It is attached by hooks alone and only looks. A measurement spans one step: gradient norms as gradients are accumulated,
gradients and a copy of the weights just before the optimizer's step, updates and weights just after. What a CUDA device
has found is fetched without waiting, and told at a later step. Relies on :mod:`measurement` for the numbers,
:mod:`update_sampler` for updates of every step, :mod:`fetch` to copy both to the host, :mod:`sinks` to store records.
"""

from __future__ import annotations

import logging
import operator
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
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
from spectrim.monitor.buffer import PartMeasurement
from spectrim.monitor.fetch import Fetch
from spectrim.monitor.inner_step import is_inner_step
from spectrim.monitor.measurement import Measurement, MeasurementRequest, squared_norms
from spectrim.monitor.metrics import RANK_RATIO
from spectrim.monitor.record import Alert, Record, entry_of, rounded, spectra_of
from spectrim.monitor.sinks import Out, sinks_of
from spectrim.monitor.skip_counts import SkipCounts
from spectrim.monitor.subjects import Subject, subjects_of
from spectrim.monitor.update_sampler import UpdateSampler, UpdateSamples

__all__ = ["KINDS", "SpectralMonitor"]

KINDS = ("gradient", "momentum", "update", "weight")
#: Steps after which what is known of every step is fetched from the device.
WATCH_EVERY = 10

logger = logging.getLogger("spectrim.monitor")


@dataclass(frozen=True)
class _Pending:
    """Numbers on their way to the host: of a measurement and of the steps since, or of the steps alone."""

    step: int
    fetch: Fetch
    watched: UpdateSamples
    measurement: Measurement | None


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
        out: where records go: a path of JSON lines, a function of a record, a sink, several of these, or None.
        exact_every: steps between exact measurements, which hold all singular values.
        exact_steps: further steps that are measured exactly.
        exact: patterns of the names that are measured exactly then.
        kinds: of matrices to measure: "gradient", "momentum" (its singular values only, on exact steps), "update",
            "weight".
        rank_ratio: the share of directions that are called the spike.
        alarm: the rule that warns: an :class:`~spectrim.monitor.alarm.Alarm`, any callable like it, or None.
        loss_scale: what losses are multiplied by before the backward pass, such as ``scaler.get_scale``; metrics are of
            gradients without it. It may return a tensor, which is fetched like everything else.
        steps_taken: steps that the optimizer has taken before.
        resume: what :meth:`state_dict` of an earlier monitor gave, to go on from there. A file of ``out`` is then gone
            on with, and what it says of later steps is dropped.

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
        loss_scale: Callable[[], float | Tensor] | None = None,
        steps_taken: int = 0,
        resume: Mapping[str, Any] | None = None,
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
        self._skips = SkipCounts(optimizer)
        self._norms: dict[Subject, Tensor] = {}
        self._accumulated: list[Subject] = []
        self._measurement: Measurement | None = None
        self._pending: deque[_Pending] = deque()
        self._told = 0.0
        self._held: list[Tensor] = []
        self._trained: list[bool] = []
        self._gradient_hooks: list[Any] = []
        self._step_hooks: list[Any] = []
        self.writes = _first()
        """Whether this process is the one that writes."""
        self._subjects = subjects_of(model, optimizer.param_groups)
        for pattern in self._patterns:
            # All that there is may be nothing: an optimizer of vectors alone.
            if pattern != "*" and not any(fnmatchcase(name, pattern) for name in self.names):
                raise ValueError(f"exact pattern {pattern!r} matches no matrix: expected some of {_some(self.names)}")
        reached = None if resume is None else int(resume["steps_taken"])
        self._sinks = sinks_of(out, resume_step=reached) if self.writes else []
        # From here on nothing fails, so that no hook is left of a monitor that was not made.
        self._bind()
        self._step_hooks.append(optimizer.register_step_pre_hook(_untraced(self._before_step)))
        self._step_hooks.append(optimizer.register_step_post_hook(_untraced(self._after_step)))
        if resume is not None:
            self.load_state_dict(resume)

    @property
    def names(self) -> list[str]:
        """The names of all matrices that are watched."""
        return [name for subject in self._subjects for name in subject.names]

    # -- State ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Steps, skips and trends as plain values, for a checkpoint; on ranks of sharded parameters, called by all.

        Waits for what is not told yet, so that the sinks have all records up to here.
        """
        self.flush()
        rule: Any = self.alarm
        alarm = rule.state_dict() if hasattr(rule, "state_dict") else None
        return {"steps_taken": self.steps_taken, "skips": self._skips.state_dict(), "alarm": alarm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was called."""
        self.flush()
        self.steps_taken = int(state["steps_taken"])
        self._skips.load_state_dict(state["skips"])
        rule: Any = self.alarm
        if state["alarm"] is not None and hasattr(rule, "load_state_dict"):
            rule.load_state_dict(state["alarm"])
        self._arm()

    def flush(self) -> None:
        """Tell what was found so far; waits for the device. Ranks of sharded parameters call this together."""
        start = time.perf_counter()
        self._fetch_watch()
        self._tell(wait=True)
        self._spend(start)

    def close(self) -> None:
        """Remove all hooks and close the sinks; ranks of sharded parameters do so together. Safe to call again."""
        if not self._step_hooks:
            return
        self.flush()
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
            # After a failure ranks may not meet any more, and what was not fetched is lost with the step.
            self._sampler = UpdateSampler([])
            self._pending.clear()
        self.close()

    # -- Hooks ---------------------------------------------------------------------------------------------------------

    def _bind(self) -> None:
        """Find what there is to watch, anew where the optimizer's parameters are others than before."""
        held = [p for group in self._optimizer.param_groups for p in group["params"]]
        trained = [p.requires_grad for p in held]
        # Asked before every step; tensors do not compare by ==.
        if trained == self._trained and all(map(operator.is_, held, self._held)):
            return
        if self._held:
            self._fetch_watch()
        self._held, self._trained = held, trained
        self._subjects = subjects_of(self._model, self._optimizer.param_groups)
        self._skips.names = {subject.position: subject.name for subject in self._subjects}
        names = self.names
        exact = {name for name in names if any(fnmatchcase(name, pattern) for pattern in self._patterns)}
        self._exact = exact
        mine = [subject for subject in self._subjects if subject.team is not None or _first()]
        self._mine = mine
        self._sampler = UpdateSampler(mine if self.alarm is not None else [])
        self._norms.clear()
        self._arm(anew=True)

    def _arm(self, *, anew: bool = False) -> None:
        """Have hooks on gradients before a step that is measured, and none before others: they cost a call each."""
        wanted = "gradient" in self.kinds and self.is_measured(self.steps_taken + 1)
        if self._gradient_hooks and (anew or not wanted):
            for hook in self._gradient_hooks:
                hook.remove()
            self._gradient_hooks = []
        if wanted and not self._gradient_hooks:
            for subject in self._mine:
                parameter: Any = subject.parameter
                hook = parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, subject))
                self._gradient_hooks.append(hook)

    def is_measured(self, step: int) -> bool:
        """Whether a step, counted from 1, is measured."""
        return step % self.every == 0 or self._is_exact(step)

    def _is_exact(self, step: int) -> bool:
        return step in self.exact_steps or (self.exact_every is not None and step % self.exact_every == 0)

    @torch.no_grad()
    def _on_gradient(self, subject: Subject, _: Tensor) -> None:
        """A gradient was accumulated: its norm is kept, that of the last micro-batch in the end."""
        if subject.team is not None:
            self._take_norms([subject])
            return
        # At the end of the backward pass all at once. Data parallelism sums gradients after this, at the end as well.
        if not self._accumulated:
            engine = Variable._execution_engine
            last = self._on_accumulated
            engine.queue_callback((lambda: engine.queue_callback(last)) if _distributed() else last)
        self._accumulated.append(subject)

    @torch.no_grad()
    def _on_accumulated(self) -> None:
        accumulated, self._accumulated = self._accumulated, []
        self._take_norms(accumulated)

    def _take_norms(self, subjects: Sequence[Subject]) -> None:
        start = time.perf_counter()
        self._norms |= squared_norms(subjects)
        self._spend(start)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_inner_step(optimizer):
            return
        start = time.perf_counter()
        self._bind()
        step = self.steps_taken + 1
        self._sampler.before()
        self._measurement = None
        if self.is_measured(step):
            exact = self._exact if self._is_exact(step) else frozenset[str]()
            scale = 1.0 if self._loss_scale is None else self._loss_scale()
            wanted = MeasurementRequest(kinds=self.kinds, exact=exact, rank_ratio=self.rank_ratio, loss_scale=scale)
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
        self._sampler.after(step, optimizer.param_groups)
        measurement, self._measurement = self._measurement, None
        if measurement is not None:
            if self._closure:
                measurement.take_gradients()
            measurement.take_step()
            self._norms.clear()
            self._fetch(step, measurement)
        elif len(self._sampler) >= WATCH_EVERY:
            self._fetch_watch()
        self._arm()
        self._spend(start)
        self._tell(wait=False)

    def _fetch(self, step: int, measurement: Measurement | None) -> None:
        """Begin to fetch, in one copy, all that is known of the steps since the last time."""
        watched = self._sampler.take()
        parts = [measurement.tensors(), self._skips.tensors()] if measurement is not None else [[], []]
        fetch = Fetch([tensor for part in (watched.tensors(), *parts) for tensor in part])
        self._pending.append(_Pending(step, fetch, watched, measurement))

    def _fetch_watch(self) -> None:
        if len(self._sampler):
            self._fetch(self.steps_taken, None)

    def _tell(self, *, wait: bool) -> None:
        """Hand on, in the order of steps, what has arrived."""
        while self._pending and (wait or self._pending[0].fetch.ready()):
            start = time.perf_counter()
            pending = self._pending.popleft()
            hosts = pending.fetch.read()
            count = len(pending.watched.tensors())
            steps = pending.watched.read(hosts[:count])
            if pending.measurement is None:
                self._warn(steps)
                self._spend(start)
                continue
            *earlier, now = steps or [(pending.step, {})]
            self._warn(earlier)
            record = self._measured(pending.step, pending.measurement, hosts[count:], now[1])
            self._spend(start)
            record["ms"], self._told = rounded(self.milliseconds - self._told) or 0.0, self.milliseconds
            self._send(record)

    def _measured(
        self, step: int, measurement: Measurement, hosts: Sequence[Tensor], now: Mapping[str, Mapping[str, float]]
    ) -> Record:
        """The record of a measurement."""
        count = measurement.count
        found = measurement.read(hosts[:count])
        record = self._record(step, found, self._skips.counts(found, hosts[count:]))
        if self.alarm is not None:
            known = {name: {**entry, **now.get(name, {})} for name, entry in record["parameters"].items()}
            alerts = self._alerts(step, {**now, **known})
            if alerts:
                record["alarms"] = alerts
        return record

    def _spend(self, start: float) -> None:
        self.milliseconds += 1000 * (time.perf_counter() - start)

    # -- Records -------------------------------------------------------------------------------------------------------

    def _record(self, step: int, found: Sequence[PartMeasurement], counts: Mapping[str, int]) -> Record:
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
    """The hook, left out of a step that is compiled or captured in a CUDA graph. Decided as it runs: asking before
    would import the compiler."""

    cuda: Any = torch.cuda

    def run(*arguments: Any) -> None:
        if torch.compiler.is_compiling():
            compiler: Any = torch.compiler
            compiler.disable(hook)(*arguments)
        elif not (cuda.is_initialized() and cuda.is_current_stream_capturing()):
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
