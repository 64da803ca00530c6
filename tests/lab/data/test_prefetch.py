import threading

import pytest
import torch
from torch import Tensor

from spectrim.lab.data.prefetch import prefetch


def numbered(step: int) -> tuple[Tensor, Tensor]:
    batch = torch.arange(4)[:, None] + 10 * step
    return batch, batch + 1


@pytest.mark.parametrize("steps", [range(0), range(3, 4), range(2, 9)])
def test_batches_come_in_order_and_split_evenly(steps: range) -> None:
    with prefetch(numbered, steps, accumulate=2) as stream:
        seen = list(stream)
    assert len(seen) == len(steps)
    for step, parts in zip(steps, seen, strict=True):
        assert [len(inputs) for inputs, _ in parts] == [2, 2]
        assert torch.equal(torch.cat([inputs for inputs, _ in parts]), numbered(step)[0])
        assert torch.equal(torch.cat([targets for _, targets in parts]), numbered(step)[1])


def test_the_next_batch_is_prepared_before_it_is_asked_for() -> None:
    asked = threading.Event()

    def batches(step: int) -> tuple[Tensor, Tensor]:
        if step == 1:
            asked.set()
        return numbered(step)

    with prefetch(batches, range(3)) as stream:
        next(stream)
        assert asked.wait(timeout=60)


def test_an_error_is_raised_where_the_batch_would_have_been_given() -> None:
    def batches(step: int) -> tuple[Tensor, Tensor]:
        if step == 2:
            raise OSError("the text is gone")
        return numbered(step)

    with prefetch(batches, range(5)) as stream:
        assert len([next(stream), next(stream)]) == 2
        with pytest.raises(OSError, match="the text is gone"):
            next(stream)
