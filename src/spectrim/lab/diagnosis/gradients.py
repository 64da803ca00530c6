"""Gradients of single batches, stacked by matrix, for the analysis of noise.

At most ``memory`` bytes of gradients are held at once. If all chosen parameters need more, the same batches are run
again for further parameters; a single parameter is always held whole.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spectrim.lab.data.batches import Batches
from spectrim.lab.diagnosis.matrices import ChosenMatrix
from spectrim.lab.errors import LabError
from spectrim.lab.training.objective import language_loss

__all__ = ["GradientSource", "GradientStack"]


class GradientStack(NamedTuple):
    """A matrix and its gradient on every batch, (batches, m, n)."""

    chosen: ChosenMatrix
    gradients: Tensor


@dataclass(kw_only=True)
class GradientSource:
    """Gradients of a model's matrices on consecutive batches."""

    model: nn.Module
    """Moved to ``device``; its weights stay as they are."""
    chosen: Sequence[ChosenMatrix]
    """The matrices; those of one parameter stand together."""
    batches: Batches
    steps: range
    """Indices of the batches."""
    memory: float
    """Bytes of gradients that may be held at once."""
    device: torch.device
    precision: str = "float32"
    accumulate: int = 1
    """Micro-batches that a batch is split into."""
    on_batch: Callable[[], None] = lambda: None
    """Called after every batch, also when batches are run again."""

    def __post_init__(self) -> None:
        self.model.to(self.device)
        self.parameters = dict(self.model.named_parameters())
        self.by_parameter = {name: list(each) for name, each in groupby(self.chosen, lambda item: item.parameter)}

    @property
    def chunks(self) -> list[list[str]]:
        """The parameters whose gradients are held together."""
        chunks: list[list[str]] = []
        room = 0.0
        for name in self.by_parameter:
            size = 4.0 * len(self.steps) * self.parameters[name].numel()
            if not chunks or size > room:
                chunks.append([])
                room = self.memory
            chunks[-1].append(name)
            room -= size
        return chunks

    def stacks(self) -> Iterator[GradientStack]:
        """Yield every matrix with its gradients; a caller may free a stack before it takes the next one.

        Raises:
            LabError: a gradient is not finite.
        """
        for names in self.chunks:
            held = self.run(names)
            for name in names:
                stack = held.pop(name)
                for each in self.by_parameter[name]:
                    yield GradientStack(each, each.read(stack, leading=1))

    def run(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The gradients of these parameters on all batches, (batches, *shape) each, in float32 on the host."""
        shapes = {name: self.parameters[name].shape for name in names}
        held = {name: torch.empty(len(self.steps), *shape) for name, shape in shapes.items()}
        wanted = {name: parameter.requires_grad for name, parameter in self.parameters.items()}
        self.model.train()
        try:
            for name, parameter in self.parameters.items():
                # Compute the wanted gradients alone.
                parameter.requires_grad_(name in held)
            for place, step in enumerate(self.steps):
                self.backward(step)
                for name, gradients in held.items():
                    gradient = self.parameters[name].grad
                    # A parameter that the batch does not use, such as an expert's, has no gradient.
                    gradients[place] = 0.0 if gradient is None else gradient
                    if not gradients[place].isfinite().all():
                        raise LabError(
                            f"the gradient of {name!r} is not finite on batch {step}: the weights have diverged, or "
                            f"precision {self.precision!r} does not hold it"
                        )
                self.on_batch()
        finally:
            for name, parameter in self.parameters.items():
                parameter.requires_grad_(wanted[name])
                parameter.grad = None
        return held

    def backward(self, step: int) -> None:
        """Set the gradient of the mean loss of a batch."""
        inputs, targets = self.batches(step)
        for parameter in self.parameters.values():
            parameter.grad = None
        with torch.random.fork_rng():
            # Dropout is the same whenever this batch is run.
            torch.manual_seed(step)
            pairs = zip(inputs.chunk(self.accumulate), targets.chunk(self.accumulate), strict=True)
            for rows, wanted in pairs:
                loss = language_loss(self.model, rows.to(self.device), wanted.to(self.device), self.precision)
                (loss / self.accumulate).backward()  # type: ignore[no-untyped-call]
