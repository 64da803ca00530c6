"""Rules that warn of unusual values; :class:`Alarm` is the default.

Many loss spikes follow an update norm far above its trend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from spectrim.monitor.record import Alert, rounded

__all__ = ["Alarm", "Rule", "Trend", "alerts_of"]

#: A function of a step's number and its values, name of a matrix -> metrics, which returns alerts. After every step the
#: metrics are "update_rms" and "lr"; on measured steps, all.
Rule = Callable[[int, Mapping[str, Mapping[str, float | None]]], Iterable[Mapping[str, Any]] | None]

_BLANK: Alert = {"parameter": "", "quantity": "", "value": None, "trend": None, "deviations": None, "message": ""}


def alerts_of(rule: Rule, step: int, values: Mapping[str, Mapping[str, float | None]]) -> list[Alert]:
    """The alerts of a rule, with missing keys filled in."""
    return [{**_BLANK, **alert} for alert in rule(step, values) or ()]  # type: ignore[typeddict-item]


#: Values are limited to this many deviations when the trend is updated, so that an outlier changes it little.
BOUND = 3.0
#: The standard deviation of a Gaussian over its mean absolute deviation.
ROBUST = math.sqrt(math.pi / 2)
#: Quantities that are proportional to the learning rate.
_MOVED = frozenset({"update_rms", "update_norm", "update_spectral_norm", "update_to_weight"})


@dataclass(slots=True)
class Trend:
    """Exponential averages of a number and of its deviation, robust against outliers.

    Attributes:
        count: number of values so far.
        mean: the average.
        deviation: the standard deviation, estimated from the mean absolute deviation.
        outside: True if the last value was too far above the average.
    """

    count: int = 0
    mean: float = 0.0
    deviation: float = 0.0
    outside: bool = False

    def add(self, value: float, *, memory: int, history: int) -> None:
        """Update the averages with a value."""
        if self.count == 0:
            self.mean = value
        # This runs for all matrices after every step. Comparisons are faster than max and min.
        rate = 1 / (self.count + 1) if self.count + 1 < memory else 1 / memory
        distance = value - self.mean
        size = abs(distance)
        if self.count >= history and size > (most := BOUND * self.deviation):
            distance, size = (most if distance > 0 else -most), most
        self.deviation += rate * (ROBUST * size - self.deviation)
        self.mean += rate * distance
        self.count += 1


class Alarm:
    """Warns when a quantity of a matrix rises too many deviations above its trend, or is not finite.

    The trend is an exponential average of the logarithm. Quantities that are proportional to the learning rate are
    divided by it, so that schedules do not cause alerts. Skipped steps and steps at learning rate zero are ignored. One
    rise gives one alert; the next follows only after the value has come back.

    Args:
        deviations: the number of deviations above the trend that gives an alert.
        quantity: "update_rms", known after every step, or any metric of the record, known on measured steps.
        history: number of values before the first alert.
        memory: number of values over which old values fade to 1/e.
        floor: the least deviation of the logarithm; with 0.05 and five deviations, an alert needs a rise of 28 %.

    Raises:
        ValueError: a value is not allowed.
    """

    def __init__(
        self,
        deviations: float = 5.0,
        *,
        quantity: str = "update_rms",
        history: int = 20,
        memory: int = 50,
        floor: float = 0.05,
    ) -> None:
        for name, value, least in (("deviations", deviations, 0), ("floor", floor, 0)):
            if not (math.isfinite(value) and value > least):
                raise ValueError(f"{name}={value!r}: expected a positive number")
        for name, number in (("history", history), ("memory", memory)):
            if not isinstance(number, int) or number < 2:
                raise ValueError(f"{name}={number!r}: expected a whole number of at least 2")
        self.deviations, self.quantity, self.floor = deviations, quantity, floor
        self.history, self.memory = history, memory
        self._trends: dict[str, Trend] = {}

    def __call__(self, step: int, values: Mapping[str, Mapping[str, float | None]]) -> list[Alert]:
        """Update the trends with the values of a step.

        Args:
            step: the step's number.
            values: name of a matrix -> metrics, in which the quantity may be missing or None.

        Returns:
            The alerts.
        """
        alerts = []
        quantity, moves = self.quantity, self.quantity in _MOVED
        for name, known in values.items():
            value = known.get(quantity)
            lr = known.get("lr") if moves else 1.0
            if not value or not lr:
                continue
            alert = self._check(step, name, value, lr)
            if alert is not None:
                alerts.append(alert)
        return alerts

    def _check(self, step: int, name: str, value: float, lr: float) -> Alert | None:
        trend = self._trends.get(name)
        if trend is None:
            trend = self._trends[name] = Trend()
        if not math.isfinite(value):
            first, trend.outside = not trend.outside, True
            message = f"step {step}: {self.quantity} of {name} is not finite"
            return self._alert(name, None, None, None, message) if first else None
        number = math.log(value / lr)
        spread = trend.deviation if trend.deviation > self.floor else self.floor
        above = trend.count >= self.history and number - trend.mean > self.deviations * spread
        if not above or trend.outside:
            trend.outside = above
            trend.add(number, memory=self.memory, history=self.history)
            return None
        deviations, usual = (number - trend.mean) / spread, math.exp(trend.mean) * lr
        trend.outside = True
        trend.add(number, memory=self.memory, history=self.history)
        message = (
            f"step {step}: {self.quantity} of {name} is {value:.3g}, {deviations:.1f} deviations above its trend of "
            f"{usual:.3g}"
        )
        return self._alert(name, value, usual, deviations, message)

    def _alert(
        self, name: str, value: float | None, trend: float | None, deviations: float | None, message: str
    ) -> Alert:
        return {
            "parameter": name,
            "quantity": self.quantity,
            "value": rounded(value),
            "trend": rounded(trend),
            "deviations": rounded(deviations),
            "message": message,
        }

    def state_dict(self) -> dict[str, Any]:
        """The trends as plain values."""
        return {name: asdict(trend) for name, trend in self._trends.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the trends of a :meth:`state_dict`."""
        self._trends = {name: Trend(**values) for name, values in state.items()}
