"""The rule by which a monitor warns, and the trend that it holds a quantity against.

An update norm far above its trend precedes many loss spikes. A rule is any callable on a step and the values of that
step; :class:`Alarm` is the one that a monitor has unless told otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from spectrim.monitor.record import Alert, rounded

__all__ = ["Alarm", "Rule", "Trend", "alerts_of"]

#: Of a step and, by the name of a matrix, its "update_rms" and "lr", and on measured steps all its metrics: warnings.
Rule = Callable[[int, Mapping[str, Mapping[str, float | None]]], Iterable[Mapping[str, Any]] | None]

_BLANK: Alert = {
    "parameter": "",
    "quantity": "",
    "value": None,
    "trend": None,
    "deviations": None,
    "message": "",
}


def alerts_of(rule: Rule, step: int, values: Mapping[str, Mapping[str, float | None]]) -> list[Alert]:
    """What a rule warns of, completed by what it leaves out."""
    return [{**_BLANK, **alert} for alert in rule(step, values) or ()]  # type: ignore[typeddict-item]


#: Deviations from which a value counts no further for the trend: an outlier bends it little, a new level bends it soon.
BOUND = 3.0
#: The standard deviation of a Gaussian over its mean absolute deviation.
ROBUST = math.sqrt(math.pi / 2)
#: Quantities that a learning rate multiplies.
_MOVED = frozenset({"update_rms", "update_norm", "update_spectral_norm", "update_to_weight"})


@dataclass(slots=True)
class Trend:
    """The running mean of a number, and how far it strays from that; old values fade, outliers count in part.

    Attributes:
        count: of values so far.
        mean: their trend.
        deviation: the standard deviation, from the mean absolute one.
        outside: whether the last value was too far above.
    """

    count: int = 0
    mean: float = 0.0
    deviation: float = 0.0
    outside: bool = False

    def add(self, value: float, *, memory: int, history: int) -> None:
        """Take a value into account."""
        if self.count == 0:
            self.mean = value
        # Of all matrices after every step: comparisons, which are faster than max and min.
        rate = 1 / (self.count + 1) if self.count + 1 < memory else 1 / memory
        distance = value - self.mean
        size = abs(distance)
        if self.count >= history and size > (most := BOUND * self.deviation):
            distance, size = (most if distance > 0 else -most), most
        self.deviation += rate * (ROBUST * size - self.deviation)
        self.mean += rate * distance
        self.count += 1


class Alarm:
    """Warns when a quantity of a matrix rises too many deviations above its trend.

    The trend is an exponential average of the logarithm; what a learning rate multiplies is taken per learning rate, so
    that schedules do not show. A skipped step, or one at learning rate zero, moves nothing and stays out of it. A value
    that is not finite is warned of as well. There is one warning for each rise: the next when the value has been back.

    Args:
        deviations: how many are too many.
        quantity: what is watched: "update_rms", known after every step, or any metric of the record, known on measured
            steps.
        history: values that a trend needs before it is held against any.
        memory: values over which it fades, after a step of 1/e.
        floor: the least deviation, in logarithms, that counts as one: 0.05 with five deviations asks for a rise of 28 %
            at least.

    Raises:
        ValueError: a value that is not allowed.
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
        """Take the values of a step into account.

        Args:
            step: its number.
            values: by the name of the matrix; a quantity that is missing or None is not known.

        Returns:
            What there is to warn of.
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
        """The trends, as plain values."""
        return {name: asdict(trend) for name, trend in self._trends.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from trends that :meth:`state_dict` gave."""
        self._trends = {name: Trend(**values) for name, values in state.items()}
