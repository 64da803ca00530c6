"""The search space of a sweep: for each recipe the learning rate and at most two more hyperparameters, with ranges.

A range is written LOW:HIGH (logarithmic where that makes sense) or LOW:HIGH:linear; choices are written A,B,C. A key
belongs to the table ``optimizer``, such as ``clip_bound`` or ``arguments.eps``; :data:`MULTIPLIER` stands for
``embedding_lr`` and ``head_lr`` together. Relied on by :mod:`spectrim.lab.experiments.sweep`.
"""

import math
import tomllib
from dataclasses import dataclass
from typing import Any

from spectrim.lab.errors import LabError
from spectrim.lab.recipes.names import RecipeName, default_hyperparameters, own_hyperparameters
from spectrim.operators import DEFAULT_SHRINK_FACTOR

__all__ = [
    "MULTIPLIER",
    "Categorical",
    "Dimension",
    "Range",
    "as_settings",
    "default_space",
    "parse_dimension",
    "spread_points",
    "starting_point",
]

MULTIPLIER = "multiplier"

LINEAR = ("momentum", "beta1", "beta2", "beta3", "mars_beta1", "mars_beta2")
"""Keys whose ranges are linear by default."""

LR_FACTOR = 8.0
BOUND_FACTOR = 4.0
"""A default range goes from the recipe's default over this factor to the default times it."""

AUTO_BOUND = 0.01
"""The threshold times the learning rate under ``clip="auto"``."""

OWN_RANGES: dict[str, tuple[float, float, float]] = {
    "shrink_factor": (3.0, DEFAULT_SHRINK_FACTOR, 48.0),
    "pre_clip": (0.02, 0.1, 0.5),
    "rank_ratio": (0.005, 0.015, 0.1),
    "momentum": (0.8, 0.95, 0.99),
    "alpha": (2.0, 8.0, 16.0),
    "gamma": (0.005, 0.025, 0.1),
    MULTIPLIER: (1.0, 4.0, 32.0),
}
"""The lowest value, the start of the search, and the highest value."""

OWN_LIMIT = 2
"""The most hyperparameters besides the learning rate; more would need more trials."""


@dataclass(frozen=True)
class Range:
    """A range from low to high, logarithmic or linear."""

    low: float
    high: float
    log: bool

    def grid(self, count: int) -> list[Any]:
        """Evenly spaced values, both ends among them."""
        return [self.at(index / (count - 1)) for index in range(count)]

    def at(self, share: float) -> float:
        """The value at a share of the way from low to high."""
        if self.log:
            return min(self.high, self.low * math.pow(self.high / self.low, share))
        return self.low + (self.high - self.low) * share

    def holds(self, value: Any) -> bool:
        """True if a value lies in the range."""
        return bool(self.low <= value <= self.high)

    def at_edge(self, value: float) -> bool:
        """True if a value lies in the outer twentieth of the range, at either end."""
        low, high, place = (math.log(end) if self.log else end for end in (self.low, self.high, value))
        return not 0.05 < (place - low) / (high - low) < 0.95


@dataclass(frozen=True)
class Categorical:
    """One of these values."""

    values: tuple[Any, ...]

    def grid(self, count: int) -> list[Any]:
        """All values, whatever the count."""
        return list(self.values)

    def at(self, share: float) -> Any:
        """The value at a share of the way through the list."""
        return self.values[min(len(self.values) - 1, int(share * len(self.values)))]

    def holds(self, value: Any) -> bool:
        """True if a value is one of the choices."""
        return value in self.values

    def at_edge(self, value: Any) -> bool:
        """True if a number is the smallest or the largest of at least three."""
        numbers = [choice for choice in self.values if isinstance(choice, int | float) and not isinstance(choice, bool)]
        return len(numbers) > 2 and value in (min(numbers), max(numbers))


Dimension = Range | Categorical


def parse_dimension(key: str, text: str) -> Dimension:
    """Read a range or a list of choices.

    Raises:
        LabError: the text is neither.
    """
    refusal = LabError(f"space {key}={text!r}: expected LOW:HIGH, LOW:HIGH:linear or A,B,C")
    if ":" not in text:
        try:
            values = tuple(tomllib.loads(f"values = [{text}]")["values"])
        except (ValueError, RecursionError):
            values = tuple(part.strip() for part in text.split(","))
        if not values or not all(isinstance(value, bool | int | float | str) for value in values):
            raise refusal
        return Categorical(values)
    low_text, high_text, *way = text.split(":")
    try:
        low, high = float(low_text), float(high_text)
    except ValueError:
        raise refusal from None
    if way not in ([], ["linear"], ["log"]) or not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise refusal
    log = way == ["log"] or (not way and low > 0 and key not in LINEAR)
    if log and low <= 0:
        raise LabError(f"space {key}={text!r}: a logarithmic range begins above 0")
    return Range(low, high, log)


def default_space(recipe: RecipeName) -> dict[str, str]:
    """The default search ranges of a recipe by key, around its default hyperparameters."""
    defaults = default_hyperparameters(recipe)
    space = {"lr": around(defaults.lr, LR_FACTOR)}
    own = own_hyperparameters(recipe)
    for key in ("clip_bound", *OWN_RANGES):
        if len(space) > OWN_LIMIT:
            break
        if key == "clip_bound" and key in own:
            space[key] = around(defaults.clip_bound or AUTO_BOUND, BOUND_FACTOR)
        # Spectra's momentum stays at its default; the rank ratio is searched instead.
        elif key == MULTIPLIER or (key in own and not (key == "momentum" and "rank_ratio" in own)):
            low, _, high = OWN_RANGES[key]
            space[key] = f"{low:g}:{high:g}"
    return space


def around(value: float, factor: float) -> str:
    return f"{value / factor:g}:{value * factor:g}"


def starting_point(recipe: RecipeName, space: dict[str, Dimension]) -> dict[str, Any]:
    """The first point of a search: the recipe's defaults that lie in the space."""
    defaults = default_hyperparameters(recipe)
    known: dict[str, Any] = {key: start for key, (_, start, _) in OWN_RANGES.items()}
    known |= {"lr": defaults.lr, "embedding_lr": defaults.embedding_lr, "head_lr": defaults.head_lr}
    known |= {MULTIPLIER: defaults.embedding_lr, "clip_bound": defaults.clip_bound or AUTO_BOUND}
    return {key: known[key] for key, dimension in space.items() if key in known and dimension.holds(known[key])}


def spread_points(space: dict[str, Dimension], count: int, *, seed: int) -> list[dict[str, Any]]:
    """Points that lie evenly along every dimension (a Latin hypercube), in random order."""
    from scipy.stats import qmc

    shares = qmc.LatinHypercube(len(space), rng=seed).random(count)
    return [
        {key: dimension.at(float(share)) for (key, dimension), share in zip(space.items(), row, strict=True)}
        for row in shares
    ]


def as_settings(point: dict[str, Any]) -> dict[str, Any]:
    """A point of the space as values of the table ``optimizer``; dotted keys become tables."""
    settings: dict[str, Any] = {}
    for key, value in point.items():
        names = ("embedding_lr", "head_lr") if key == MULTIPLIER else (key,)
        for name in names:
            *tables, last = name.split(".")
            target = settings
            for table in tables:
                target = target.setdefault(table, {})
            target[last] = value
    return settings
