"""Worker processes of a sweep on one machine."""

import os
import sys
from pathlib import Path

from spectrim.lab.errors import Interrupted, LabError
from spectrim.lab.experiments.sweep import Sweep
from spectrim.lab.recipes import external

__all__ = ["run_workers", "say_on_stderr"]


def run_workers(sweep: Sweep, workers: int, *, threads: int | None = None, cache_dir: Path | None = None) -> None:
    """Do the remaining trials in several processes; each has ``threads``, by default an equal share of the cores."""
    from multiprocessing import get_context

    threads = threads or max(1, (os.cpu_count() or 1) // workers)
    context = get_context("spawn")
    # Without this a module in the current directory could replace one of Python's own while a worker starts.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    given = (sweep.out, threads, cache_dir, external.trusted(), sweep.compiled)
    processes = [context.Process(target=worker, args=given) for _ in range(workers)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join()
    except (KeyboardInterrupt, Interrupted):
        # Every worker finishes its step and writes a checkpoint.
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        raise


def worker(out: Path, threads: int, cache_dir: Path | None, trusted: frozenset[str], compiled: bool) -> None:
    """The main function of a worker process."""
    import torch

    external.trust(trusted)

    # Ctrl-C reaches the parent, which stops the workers once; a second signal would end them within a step.
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    torch.set_num_threads(threads)
    try:
        sweep = Sweep(out)
        sweep.compiled = compiled
        sweep.work(cache_dir=cache_dir, say=say_on_stderr)
    except LabError as error:
        print(f"spectrim: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as error:
        sys.exit(128 + error.number)


def say_on_stderr(line: str) -> None:
    """Print a line on stderr at once."""
    print(line, file=sys.stderr, flush=True)
