"""Processes for one test: a function on every rank of a gloo world, or in a process alone, and what it returns.

They are forked from one server that has imported torch and the lab, for importing takes longer than most of what they
do; where a system cannot fork they start from nothing.
"""

import contextlib
import io
import multiprocessing
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

#: Seconds until what hangs fails: not soon, for on a busy machine all takes many times longer.
PATIENCE = 3600

#: What the server imports.
PRELOADED = [
    "parallel_cases",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.nn.parallel",
]


def context() -> BaseContext:
    """How processes start here."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    return found


def run(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What the function, of a module that children can import, returned on each rank. It takes (rank, *arguments)."""
    with tempfile.TemporaryDirectory() as folder:
        if context().get_start_method() == "spawn":
            _start_ranks(world, folder, function, arguments, "spawn")
        else:
            # What the function's module imports is imported once, by a process from which the ranks are forked.
            ended = alone(_start_ranks, world, folder, function, arguments, "fork")
            if ended.code != 0:
                raise RuntimeError(f"ranks ended with {ended.code}: {ended.err}")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _start_ranks(world: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...], how: Any) -> None:
    getattr(sys.modules[function.__module__], "before_ranks", lambda: None)()
    mp.start_processes(_on_rank, (world, folder, function, arguments), nprocs=world, start_method=how)


def _on_rank(rank: int, world: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        torch.save(function(rank, *arguments), Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


class Ended(NamedTuple):
    """How a process ended: its exit code, and what it wrote if it was not killed."""

    code: int | None
    out: str
    err: str


def alone(function: Callable[..., int | None], *arguments: Any) -> Ended:
    """Run a function, of a module that children can import, in a process of its own; it returns the exit code."""
    here = context()
    mine, its = here.Pipe(duplex=False)
    process: Any = here.Process(target=_alone, args=(its, function, arguments))  # type: ignore[attr-defined]
    process.start()
    its.close()
    try:
        ended = Ended(*mine.recv())
    except EOFError:
        ended = Ended(None, "", "")
    process.join()
    return ended if process.exitcode == 0 else Ended(process.exitcode, "", "")


def _alone(answer: Connection, function: Callable[..., int | None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = function(*arguments) or 0
        except BaseException:
            traceback.print_exc()
            code = 1
    answer.send((code, out.getvalue(), err.getvalue()))
