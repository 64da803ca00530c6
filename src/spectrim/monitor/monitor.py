"""SpectralMonitor measures the spectra of gradients, updates and weights while a model trains.

It uses hooks only. A measurement takes gradient norms during the backward pass, gradients and a copy of the weights
before the optimizer's step, updates and weights after it. Results on a CUDA device are copied without waiting, and
reported at a later step.
"""

from __future__ import annotations

import logging
import operator
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from spectrim.monitor.alarm import Alarm, Rule, alerts_of
from spectrim.monitor.arguments import KINDS, check_arguments, check_patterns
from spectrim.monitor.fetch import Fetch
from spectrim.monitor.gradient_norms import GradientNorms, is_distributed
from spectrim.monitor.measurement import Measurement
from spectrim.monitor.metrics import RANK_RATIO
from spectrim.monitor.record import Alert, Record, record_of, rounded
from spectrim.monitor.sinks import Out, sinks_of
from spectrim.monitor.skip_counts import SkipCounts
from spectrim.monitor.step_hooks import innermost, is_inner_step, untraced
from spectrim.monitor.subjects import subjects_of
from spectrim.monitor.update_sampler import UpdateSampler, UpdateSamples

__all__ = ["KINDS", "SpectralMonitor"]

#: Steps between copies of the samples of every step to the host.
WATCH_EVERY = 10

logger = logging.getLogger("spectrim.monitor")


@dataclass(frozen=True)
class _Pending:
    """Numbers under way to the host: samples of the last steps, and possibly a measurement."""

    step: int
    fetch: Fetch
    watched: UpdateSamples
    measurement: Measurement | None


class SpectralMonitor:
    """Measure gradients, updates and weights of every matrix of a model at regular steps.

        monitor = spectrim.SpectralMonitor(model, optimizer, every=100)

    The training loop stays as it is, and so does training: the monitor draws no random numbers and writes to no weight,
    gradient or state. It works with any ``torch.optim.Optimizer``, and with parameters sharded by FSDP2 or tensor
    parallelism: make a monitor on every rank, of which the first writes the records.

    Args:
        model: names of its parameters are used in records, without those of wrappers.
        optimizer: its steps are counted and its parameters measured.
        every: steps between measurements.
        out: where records go: a path of JSON lines, a function of a record, a sink, several of these, or None.
        exact_every: steps between exact measurements, which hold all singular values.
        exact_steps: further steps to measure exactly.
        exact: name patterns of the matrices to measure exactly.
        kinds: the matrices to measure: "gradient", "momentum" (singular values only, on exact steps), "update",
            "weight".
        rank_ratio: the share of singular values that form the spike.
        alarm: the rule that warns: an :class:`~spectrim.monitor.alarm.Alarm`, a callable like it, or None.
        loss_scale: returns the factor on the loss, such as ``scaler.get_scale``; gradients are divided by it. It may
            return a tensor on a device, which is copied with the measurement.
        steps_taken: steps that the optimizer has already taken.
        resume: the :meth:`state_dict` of an earlier monitor to continue from. A file of ``out`` is continued too; its
            records of later steps are deleted.

    Raises:
        ValueError: a value is not allowed, or a pattern matches nothing; the message names it.
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
        kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        check_arguments(every, steps_taken, exact_every, kinds, rank_ratio, alarm)
        optimizer = innermost(optimizer)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"cannot monitor a {type(optimizer).__name__}: expected a torch.optim.Optimizer")
        self.every, self.exact_every = every, exact_every
        self.exact_steps = frozenset(exact_steps)
        self.kinds, self.rank_ratio = kinds, rank_ratio
        self.alarm: Rule | None = Alarm() if alarm == "default" else alarm
        self.steps_taken = steps_taken
        self.milliseconds = 0.0
        """The host time of the monitor so far."""
        self.last: Record | None = None
        """The last record, on the rank that writes."""
        self._model, self._optimizer, self._loss_scale = model, optimizer, loss_scale
        self._patterns = [exact] if isinstance(exact, str) else list(exact)
        self._skips = SkipCounts(optimizer)
        self._gradients = GradientNorms(self._timed)
        self._measurement: Measurement | None = None
        self._pending: deque[_Pending] = deque()
        self._reported = 0.0
        self._held: list[Tensor] = []
        self._trained: list[bool] = []
        self._step_hooks: list[Any] = []
        self.writes = _first()
        """True on the rank that writes records."""
        self._subjects = subjects_of(model, optimizer.param_groups)
        check_patterns(self._patterns, self.names)
        reached = None if resume is None else int(resume["steps_taken"])
        self._sinks = sinks_of(out, resume_step=reached) if self.writes else []
        # Hooks come last, so that a constructor that raises leaves none behind.
        self._bind()
        self._step_hooks.append(optimizer.register_step_pre_hook(untraced(self._before_step)))
        self._step_hooks.append(optimizer.register_step_post_hook(untraced(self._after_step)))
        if resume is not None:
            self.load_state_dict(resume)

    @property
    def names(self) -> list[str]:
        """The names of all matrices that are measured."""
        return [name for subject in self._subjects for name in subject.names]

    # -- State ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Counts of steps and skips, and trends of the alarm, as plain values. All ranks of sharded parameters call it.

        Waits for the device, so that the sinks have all records up to here.
        """
        self.flush()
        rule: Any = self.alarm
        alarm = rule.state_dict() if hasattr(rule, "state_dict") else None
        return {"steps_taken": self.steps_taken, "skips": self._skips.state_dict(), "alarm": alarm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`."""
        self.flush()
        self.steps_taken = int(state["steps_taken"])
        self._skips.load_state_dict(state["skips"])
        rule: Any = self.alarm
        if state["alarm"] is not None and hasattr(rule, "load_state_dict"):
            rule.load_state_dict(state["alarm"])
        self._arm()

    def flush(self) -> None:
        """Wait for the device and send all pending records. All ranks of sharded parameters call it."""
        with self._timed():
            self._fetch_watch()
        self._report(wait=True)

    def close(self) -> None:
        """Remove all hooks and close the sinks. All ranks of sharded parameters call it; further calls do nothing."""
        if not self._step_hooks:
            return
        self.flush()
        self._gradients.detach()
        for hook in self._step_hooks:
            hook.remove()
        self._step_hooks = []
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> SpectralMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            # After an exception, other ranks may not take part any more. Numbers that are not copied yet are lost.
            self._sampler = UpdateSampler([])
            self._pending.clear()
        self.close()

    # -- Hooks ---------------------------------------------------------------------------------------------------------

    def _bind(self) -> None:
        """List the matrices to measure, if the optimizer's parameters have changed."""
        held = [p for group in self._optimizer.param_groups for p in group["params"]]
        trained = [p.requires_grad for p in held]
        # Compare by identity: == on tensors compares their entries.
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
        self._gradients.detach()
        self._gradients.norms.clear()
        self._arm()

    def _arm(self) -> None:
        """Attach hooks to gradients if the next step is measured, else remove them."""
        if "gradient" in self.kinds and self.is_measured(self.steps_taken + 1):
            self._gradients.attach(self._mine)
        else:
            self._gradients.detach()

    def is_measured(self, step: int) -> bool:
        """Whether a step, counted from 1, is measured."""
        return step % self.every == 0 or self._is_exact(step)

    def _is_exact(self, step: int) -> bool:
        return step in self.exact_steps or (self.exact_every is not None and step % self.exact_every == 0)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_inner_step(optimizer):
            return
        with self._timed():
            self._bind()
            step = self.steps_taken + 1
            self._sampler.before()
            self._measurement = None
            if self.is_measured(step):
                self._measurement = Measurement(
                    self._mine,
                    optimizer,
                    self._gradients.norms,
                    kinds=self.kinds,
                    exact=self._exact if self._is_exact(step) else frozenset(),
                    rank_ratio=self.rank_ratio,
                    loss_scale=1.0 if self._loss_scale is None else self._loss_scale(),
                )
                # With a closure, the step itself computes the gradients.
                self._closure = any(value is not None for value in (*args[1:], kwargs.get("closure")))
                if not self._closure:
                    self._measurement.take_gradients()
                self._measurement.take_weights()

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_inner_step(optimizer):
            return
        with self._timed():
            step = self.steps_taken = self.steps_taken + 1
            self._sampler.after(step, optimizer.param_groups)
            measurement, self._measurement = self._measurement, None
            if measurement is not None:
                if self._closure:
                    measurement.take_gradients()
                measurement.take_step()
                self._gradients.norms.clear()
                self._fetch(step, measurement)
            elif len(self._sampler) >= WATCH_EVERY:
                self._fetch_watch()
            self._arm()
        self._report(wait=False)

    def _fetch(self, step: int, measurement: Measurement | None) -> None:
        """Begin to copy the samples since the last call, and a measurement if given, to the host in one copy."""
        watched = self._sampler.take()
        parts = [measurement.tensors(), self._skips.tensors()] if measurement is not None else [[], []]
        fetch = Fetch([tensor for part in (watched.tensors(), *parts) for tensor in part])
        self._pending.append(_Pending(step, fetch, watched, measurement))

    def _fetch_watch(self) -> None:
        if len(self._sampler):
            self._fetch(self.steps_taken, None)

    def _report(self, *, wait: bool) -> None:
        """Send the records of copies that have arrived, in the order of steps; with ``wait``, of all copies."""
        while self._pending and (wait or self._pending[0].fetch.ready()):
            with self._timed():
                record = self._record(self._pending.popleft())
            if record is not None:
                record["ms"], self._reported = rounded(self.milliseconds - self._reported) or 0.0, self.milliseconds
                self._send(record)

    def _record(self, pending: _Pending) -> Record | None:
        """Send warnings of the steps before, and return the record of the measurement, if there is one."""
        hosts = pending.fetch.read()
        count = len(pending.watched.tensors())
        steps = pending.watched.read(hosts[:count])
        if pending.measurement is None:
            self._warn(steps)
            return None
        *earlier, now = steps or [(pending.step, {})]
        self._warn(earlier)
        return self._measured(pending.step, pending.measurement, hosts[count:], now[1])

    def _measured(
        self, step: int, measurement: Measurement, hosts: Sequence[Tensor], now: Mapping[str, Mapping[str, float]]
    ) -> Record:
        """The record of a measurement, with the alarm's alerts."""
        count = measurement.count
        found = measurement.read(hosts[:count])
        record = record_of(step, found, self._skips.counts(found, hosts[count:]))
        if self.alarm is not None:
            known = {name: {**entry, **now.get(name, {})} for name, entry in record["parameters"].items()}
            alerts = self._alerts(step, {**now, **known})
            if alerts:
                record["alarms"] = alerts
        return record

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Add the time of a block to :attr:`milliseconds`."""
        start = time.perf_counter()
        yield
        self.milliseconds += 1000 * (time.perf_counter() - start)

    # -- Records -------------------------------------------------------------------------------------------------------

    def _warn(self, steps: Iterable[tuple[int, Mapping[str, Mapping[str, float | None]]]]) -> None:
        """Send records of steps without a measurement for which the alarm has alerts."""
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


def _first() -> bool:
    return not is_distributed() or dist.get_rank() == 0
