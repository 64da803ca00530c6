"""A run on several processes that torchrun starts: ranks, the values they exchange, and the rows of a batch of each.

Ranks agree on options, checkpoints and signals over a gloo group, on any device. One process exchanges nothing.
:mod:`spectrim.lab.training.placement` spreads the model.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from spectrim.lab.errors import LabError

__all__ = ["ONE_PROCESS", "Mode", "Parallel", "drawn_seed", "open_parallel"]

Mode = Literal["fsdp", "ddp", "hsdp", "tp"]
"""Ways to spread the model over processes; the first is the default."""

PATIENCE = timedelta(days=1)
"""Longest wait for rank 0 to tokenize, or for another rank; a rank that dies is noticed at once."""

ARRIVAL = timedelta(minutes=30)
"""Longest wait for the last rank to start."""

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """This rank among the processes that train one model together."""

    mode: Mode | None = None
    rank: int = 0
    ranks: int = 1
    control: Any = None
    """The group over which ranks agree; None for one process."""

    @property
    def is_first(self) -> bool:
        """True for the process that writes log, caches and results."""
        return self.rank == 0

    @property
    def data_ranks(self) -> int:
        """The number of parts that a batch is split into; under tensor parallelism every rank sees all of it."""
        return 1 if self.mode == "tp" else self.ranks

    @property
    def data_rank(self) -> int:
        """The index of this process's part."""
        return 0 if self.mode == "tp" else self.rank

    def describe(self) -> dict[str, str | int]:
        """The number of processes and their layout, which decide rounding; empty for one process."""
        return {"ranks": self.ranks, "parallel": str(self.mode)} if self.ranks > 1 else {}

    def check_batch(self, batch_size: int, accumulate: int) -> None:
        """Refuse a batch that cannot be split evenly.

        Raises:
            LabError: it names the numbers.
        """
        if batch_size % (self.data_ranks * accumulate):
            raise LabError(
                f"data.batch_size={batch_size} is of all ranks together: expected a multiple of {self.data_ranks} "
                f"data-parallel ranks times accumulate={accumulate}"
            )

    def rows(self, tensor: Tensor) -> Tensor:
        """This process's rows of a batch; none where there are fewer rows than ranks."""
        first, last = (len(tensor) * index // self.data_ranks for index in (self.data_rank, self.data_rank + 1))
        return tensor[first:last]

    def seed(self, seed: int, step: int) -> None:
        """Seed a step by run, step and rank, so that dropout masks differ between ranks and need no saving.

        One process draws from its global random state instead, which its checkpoints hold.
        """
        if self.ranks > 1:
            torch.manual_seed(drawn_seed(seed, step, self.data_rank))

    # -- Exchange between ranks ----------------------------------------------------------------------------------------

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in their order; values can be pickled."""
        if self.ranks == 1:
            return [value]
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_first(self, function: Callable[[], Result]) -> Result:
        """Call on rank 0 alone while the others wait; every rank returns its result or raises its error."""
        if self.ranks == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = function()
            except (LabError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self.control)
        if outcome[1] is not None:
            raise outcome[1]
        result: Result = outcome[0]
        return result

    def first_then_all(self, function: Callable[[], Result]) -> Result:
        """Call on rank 0 first, then on the others, which read its files."""
        results: list[Result] = []
        self.from_first(lambda: results.append(function()))
        return results[0] if results else function()

    def agree(self, values: Mapping[str, Any]) -> None:
        """Make sure that all ranks hold the same values.

        Raises:
            LabError: on every rank, naming what differs and where.
        """
        first, *others = self.gather({"--parallel": self.mode, **values})
        for rank, other in enumerate(others, start=1):
            differing = [key for key in first | other if first.get(key) != other.get(key)]
            if differing:
                told = (
                    f"{key} is {first.get(key)!r} on rank 0, {other.get(key)!r} on rank {rank}" for key in differing
                )
                raise LabError(f"ranks disagree: {'; '.join(told)}")

    def means(self, numbers: list[float]) -> list[float]:
        """The mean of each number over the parts of a batch; the same bits on every rank."""
        if self.data_ranks == 1:
            return numbers
        return [sum(column) / self.ranks for column in zip(*self._numbers(numbers), strict=True)]

    def any_signal(self, number: int | None) -> int | None:
        """The signal that any rank has received, so that all end after the same step."""
        return number if self.ranks == 1 else int(max(self._numbers([number or 0]))[0]) or None

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over the parts of a batch."""
        if self.data_ranks == 1:
            return tensor
        total = tensor.cpu()
        dist.all_reduce(total, group=self.control)
        return total.to(tensor.device)

    def _numbers(self, numbers: list[float]) -> list[list[float]]:
        found = [torch.empty(len(numbers), dtype=torch.float64) for _ in range(self.ranks)]
        dist.all_gather(found, torch.tensor(numbers, dtype=torch.float64), group=self.control)
        return [each.tolist() for each in found]

    # -- Restarts ------------------------------------------------------------------------------------------------------

    def mark_begun(self, out: Path) -> None:
        """Record in torchrun's store, which outlives the workers, that this launch may write to a folder."""
        if (store := launch_store()) is not None:
            store.set(begun_key(out), "1")

    def has_begun(self, out: Path) -> bool:
        """True if torchrun has restarted the workers of a run in this folder."""
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
            return False
        store = launch_store()
        return store is not None and bool(store.check([begun_key(out)]))


def drawn_seed(*numbers: int) -> int:
    """One seed drawn from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) % 2**63


ONE_PROCESS = Parallel()


@contextmanager
def open_parallel(mode: str | None) -> Iterator[Parallel]:
    """Join the process group of torchrun, if there is one, and destroy it at the end.

    Args:
        mode: one of :data:`Mode`, or None for its first.

    Raises:
        LabError: the mode is unknown, or given to a process that torchrun has not started.
    """
    modes = get_args(Mode)
    if mode is not None and mode not in modes:
        raise LabError(f"--parallel {mode!r}: expected one of {', '.join(modes)}")
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        if mode is not None:
            raise LabError(
                f"--parallel {mode} needs several processes: torchrun --nproc-per-node N -m spectrim train ..."
            )
        yield ONE_PROCESS
        return
    if os.environ["WORLD_SIZE"] == "1":
        yield ONE_PROCESS
        return
    with ended_at_once():
        cuda = torch.cuda.is_available() and dist.is_nccl_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        join("cpu:gloo,cuda:nccl" if cuda else "gloo")
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
        chosen: Any = mode or modes[0]
        yield Parallel(mode=chosen, rank=dist.get_rank(), ranks=dist.get_world_size(), control=control)
        # After an error the other ranks may be gone, and destroying the group would wait for them.
        dist.destroy_process_group()


def join(backend: str) -> None:
    """Connect to the other ranks; a restart needs a new prefix, since torchrun's store keeps the old addresses."""
    if (store := launch_store()) is None:
        dist.init_process_group(backend)
        return
    attempt = f"spectrim/attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    fresh = dist.PrefixStore(attempt, store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=fresh, rank=rank, world_size=ranks)


@contextmanager
def ended_at_once() -> Iterator[None]:
    """Let SIGTERM end the process at once: Python handles no signal while it waits for another rank."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def launch_store() -> Any:
    """The store that torchrun keeps over restarts of its workers; None if torchrun does not keep it."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=ARRIVAL)  # type: ignore[attr-defined]


def begun_key(out: Path) -> str:
    return f"spectrim/begun/{out.absolute()}"
