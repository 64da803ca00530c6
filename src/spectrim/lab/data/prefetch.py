"""Prepares batches ahead: a thread gathers the next ones while the model works on the current one."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["MicroBatches", "prefetch"]

MicroBatches = list[tuple[Tensor, Tensor]]
"""Inputs and targets of every micro-batch of a step, on the device."""


@contextmanager
def prefetch(
    batches: Callable[[int], tuple[Tensor, Tensor]],
    steps: range,
    *,
    accumulate: int = 1,
    device: torch.device | None = None,
    ahead: int = 2,
) -> Iterator[Iterator[MicroBatches]]:
    """Yield the batches of ``steps`` in order, each split into ``accumulate`` equal parts. The batch of a step is
    always ``batches(step)``, so preparing ahead changes no result. An error in ``batches`` is raised when its batch is
    due.
    """
    target = device or torch.device("cpu")

    def prepare(step: int) -> MicroBatches:
        inputs, targets = batches(step)
        parts = zip(inputs.chunk(accumulate), targets.chunk(accumulate), strict=True)
        return [(move(part_inputs, target), move(part_targets, target)) for part_inputs, part_targets in parts]

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
        waiting: deque[Future[MicroBatches]] = deque(pool.submit(prepare, step) for step in steps[:ahead])

        def stream() -> Iterator[MicroBatches]:
            for step in steps:
                batch = waiting.popleft().result()
                if step + ahead * steps.step in steps:
                    waiting.append(pool.submit(prepare, step + ahead * steps.step))
                yield batch

        try:
            yield stream()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device; from pinned memory the host does not wait for the copy."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
