"""Measures how an optimizer's step splits into a decay of the weights, which is not clipped, and a change, which is.

A copy of the optimizer takes a few steps on one small parameter with fixed gradients. The steps are compared with the
predictions of each possible split.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = [
    "STEPS",
    "Miniature",
    "StepDecomposition",
    "check_base",
    "find_decomposition",
    "gradients",
    "numbers",
    "options_of",
    "refusal",
]

# Steps of a probe, enough to notice methods that act every few steps, such as Lookahead with a period of six.
STEPS = 12
# Learning rates of a probe. Two determine the decay, the third confirms that it is linear in the rate; it is 1, at
# which methods that adapt their own rate do so.
RATES = (2.0**-7, 2.0**-6, 1.0)
# Relative tolerance. In float64 the correct split agrees to 1e-15; overlooking a decay of 1e-6 gives an error of 1e-8.
TOLERANCE = 1e-10
# The sizes of a probe's parameter, as many as the real one has dimensions. They differ, so that no matrix is square.
SIZES = (6, 4, 3, 2)


@dataclass(frozen=True, kw_only=True)
class StepDecomposition:
    """How an optimizer steps parameters of one number of dimensions: X ← keep · X + change, keep = 1 − ηλ − φ.

    Attributes:
        zeroed: the change does not depend on the weights, and is the result of a step from zero weights; otherwise it
            is the new weights minus keep times the old ones.
        decay: λ.
        fixed_decay: φ.
        coupling: coupling · weight_decay · X is added to the gradient: 1, or −1 if the optimizer maximizes; else 0.
        idles: some steps leave a parameter unchanged, without decay, such as the first step of SOAP.
        writes_gradients: a step writes to the gradient.
    """

    zeroed: bool
    decay: float = 0.0
    fixed_decay: float = 0.0
    coupling: float = 0.0
    idles: bool
    writes_gradients: bool

    def keep(self, lr: float | Tensor) -> float | Tensor:
        """The factor on a weight before the change is added."""
        return 1 - lr * self.decay - self.fixed_decay


def find_decomposition(optimizer: Optimizer, group: Mapping[str, Any], dimensions: int) -> StepDecomposition:
    """Measure how an optimizer steps the parameters of a group that have this number of dimensions.

    The optimizer, its parameters and the global random state are not changed.

    Raises:
        ValueError: the probe fails, or no split of the step is exact; the message gives the reason.
    """
    options = options_of(group)
    shape = tuple(SIZES[min(index, len(SIZES) - 1)] for index in range(dimensions))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            decomposition = (
                _zeroed(optimizer, options, shape)
                or _coupled(optimizer, options, shape)
                or _direct(optimizer, options, shape)
            )
    except Exception as error:
        reason = f"a step on a small dense parameter of shape {shape} failed with {type(error).__name__}: {error}"
        raise refusal(optimizer, reason) from error
    if decomposition is None:
        raise refusal(
            optimizer,
            f"with these options, its step on parameters of {dimensions} dimensions does not separate into a decay and "
            f"a change, or its state holds weights",
        )
    return decomposition


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options for a probe, which runs on the host."""
    options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    if "capturable" in options:
        options["capturable"] = False
    return options


def check_base(optimizer: Optimizer) -> None:
    """Raise ValueError, with the reason, for an optimizer that cannot be probed."""
    inner = [key for key, value in vars(optimizer).items() if isinstance(value, Optimizer)]
    if inner:
        raise refusal(optimizer, f"it wraps another optimizer, {inner[0]!r}; wrap that one instead")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise refusal(optimizer, "its step needs a closure")
    if any("lr" not in group for group in optimizer.param_groups):
        raise refusal(optimizer, "its groups have no learning rate 'lr'")


def refusal(optimizer: Optimizer, reason: str) -> ValueError:
    """The error for an optimizer that cannot be wrapped."""
    return ValueError(f"SpectralClipping cannot wrap {type(optimizer).__name__}: {reason}")


class Miniature:
    """A copy of an optimizer with its attributes and options, one small parameter, no state and no hooks."""

    def __init__(self, optimizer: Optimizer, options: Mapping[str, Any], zeros: Tensor, lr: float) -> None:
        self.parameter = zeros.requires_grad_()
        self.idled = False
        self.wrote_gradient = False
        self._steps = 0
        # copy.copy would lose attributes: torch's __getstate__ keeps only three.
        self._optimizer: Optimizer = object.__new__(type(optimizer))
        for key, value in vars(optimizer).items():
            if key.startswith("_optimizer_") and key.endswith("_hooks"):
                value = OrderedDict()
            if key not in ("state", "param_groups"):
                setattr(self._optimizer, key, copy.copy(value) if isinstance(value, dict | list | set) else value)
        self._optimizer.state = defaultdict(dict)
        self._optimizer.param_groups = [{**copy.deepcopy(dict(options)), "lr": lr, "params": [self.parameter]}]

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Take a step from a weight; returns the new weight."""
        self.advance(weight, grad)
        self.idled |= torch.equal(self.parameter, weight)
        self.wrote_gradient |= self.parameter.grad is None or not torch.equal(self.parameter.grad, grad)
        return self.parameter.detach().clone()

    def advance(self, weight: Tensor, grad: Tensor) -> None:
        """Take a step from a weight, which may be a DTensor where the parameter is one."""
        # Optimizers that use random numbers must use the same ones in every miniature.
        torch.default_generator.manual_seed(self._steps)
        self._steps += 1
        self.parameter.copy_(weight)
        self.parameter.grad = grad.clone()
        # The class's step: schedulers replace the instance's step by one that is bound to the original.
        type(self._optimizer).step(self._optimizer)

    def remembers_other_weights_than(self, other: Miniature) -> bool:
        """True if a state tensor of the parameter's shape differs from the other's: it then depends on the weights."""
        mine, its = (
            [
                value
                for _, value in sorted(each._optimizer.state[each.parameter].items())
                if isinstance(value, Tensor) and value.ndim and value.shape == each.parameter.shape
            ]
            for each in (self, other)
        )
        return not all(_close(left, right) for left, right in zip(mine, its, strict=True))


def _miniature(optimizer: Optimizer, options: Mapping[str, Any], shape: tuple[int, ...], lr: float) -> Miniature:
    return Miniature(optimizer, options, torch.zeros(shape, dtype=torch.float64), lr)


def _zeroed(
    optimizer: Optimizer, options: Mapping[str, Any], shape: tuple[int, ...], coupling: float = 0.0
) -> StepDecomposition | None:
    """The decomposition of an optimizer whose change does not depend on the weights, or None."""
    keeps = []
    for lr in RATES:
        real, mirror = (_miniature(optimizer, options, shape, lr) for _ in range(2))
        weight, measured = numbers(shape, seed=0), []
        for grad in gradients(shape):
            new = real.step(weight, grad)
            added = grad if coupling == 0 else grad + coupling * options["weight_decay"] * weight
            change = mirror.step(torch.zeros_like(weight), added)
            if not (torch.equal(new, weight) and not change.any()):
                measured.append(_multiple(new - change, weight))
            weight = new
        keep = _common(measured)
        if keep is None or real.remembers_other_weights_than(mirror):
            return None
        keeps.append(keep)
    found = _decomposition(keeps, real, zeroed=True, coupling=coupling)
    return found if coupling == 0 or (found and (found.decay, found.fixed_decay) == (0.0, 0.0)) else None


def _coupled(optimizer: Optimizer, options: Mapping[str, Any], shape: tuple[int, ...]) -> StepDecomposition | None:
    """The decomposition of an optimizer that adds its decay to the gradient, or None."""
    if not options.get("weight_decay"):
        return None
    return _zeroed(optimizer, options, shape, coupling=1.0) or _zeroed(optimizer, options, shape, coupling=-1.0)


def _direct(optimizer: Optimizer, options: Mapping[str, Any], shape: tuple[int, ...]) -> StepDecomposition | None:
    """The decomposition of an optimizer whose change depends on the weights, or None.

    The decay is the difference to the same step with ``weight_decay`` 0. State must not depend on the weights, since
    clipping changes the weights behind the optimizer's back.
    """
    undecayed = {**options, **{key: 0.0 for key in options if key.startswith("weight_decay")}}
    weight, elsewhere = numbers(shape, seed=0), numbers(shape, seed=-1)
    keeps = []
    for lr in RATES:
        real, wandering = (_miniature(optimizer, options, shape, lr) for _ in range(2))
        bare = _miniature(optimizer, undecayed, shape, lr)
        measured = []
        for index, grad in enumerate(gradients(shape)):
            new, other = real.step(weight, grad), wandering.step(elsewhere if index % 2 else weight, grad)
            if index % 2 == 0 and not _close(other, new):
                return None
            without = bare.step(weight, grad)
            if not torch.equal(new, weight):
                measured.append(_multiple(weight + new - without, weight))
        keep = _common(measured)
        if keep is None or real.remembers_other_weights_than(wandering):
            return None
        keeps.append(keep)
    return _decomposition(keeps, real, zeroed=False)


def _decomposition(
    keeps: Sequence[float], stepped: Miniature, *, zeroed: bool, coupling: float = 0.0
) -> StepDecomposition | None:
    """The decomposition by the factors on the weights at :data:`RATES`, or None if they are not 1 − ηλ − φ."""
    decay = (keeps[0] - keeps[1]) / (RATES[1] - RATES[0])
    fixed_decay = 1 - keeps[0] - RATES[0] * decay
    if abs(1 - RATES[2] * decay - fixed_decay - keeps[2]) > TOLERANCE:
        return None
    return StepDecomposition(
        zeroed=zeroed,
        # Rounded to the digits that float64 resolves here, so that no decay gives exactly 0. Adding zero turns
        # −0 into 0.
        decay=round(decay, 10) + 0.0,
        fixed_decay=round(fixed_decay, 12) + 0.0,
        coupling=coupling,
        idles=stepped.idled,
        writes_gradients=stepped.wrote_gradient,
    )


def numbers(shape: tuple[int, ...], *, seed: int) -> Tensor:
    """Normal random numbers in float64, on the host."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def gradients(shape: tuple[int, ...], steps: int = STEPS) -> list[Tensor]:
    """The gradients of a probe's steps."""
    # Gradients with a common part make methods that adapt their own learning rate do so, which changes their decay.
    common = numbers(shape, seed=steps + 1)
    return [common + numbers(shape, seed=seed) for seed in range(1, steps + 1)]


def _close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).norm() <= TOLERANCE * expected.norm())


def _multiple(tensor: Tensor, of: Tensor) -> float | None:
    """The factor f if ``tensor`` is f times ``of``, else None."""
    factor = (tensor * of).sum() / of.square().sum()
    return factor.item() if _close(factor * of, tensor) else None


def _common(values: Sequence[float | None]) -> float | None:
    """The mean of the values if all are equal up to the tolerance, else None."""
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values) or max(numbers) - min(numbers) > TOLERANCE:
        return None
    return sum(numbers) / len(numbers)
