"""Makes helpers such as oracle.py importable by every test, under --import-mode=importlib too, seeds every test, and
says how tests are shared out among processes (``-n auto``)."""

import os
import sys
from pathlib import Path
from typing import Any

# Before torch is imported, and for every process that a test starts. The tests' matrices are small: threads that wait
# for each other cost more than they bring, on a busy machine many times more, and how a sum is split decides rounding.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

#: Files that take longest, in that order: they start first, so that no process is left with one at the end.
SLOW = (
    "kernels/test_interpreted.py",
    "lab/training/test_processes.py",
    "distributed/test_same_update.py",
    "kernels/test_compiles.py",
    "distributed/test_promises.py",
    "lab/planning/test_scaling.py",
    "test_examples.py",
    "integrations/test_torchtitan.py",
    "integrations/test_transformers.py",
    "test_docs.py",
)
#: Processes that ``-n auto`` may start: more memory than speed is gained by further ones.
MOST_PROCESSES = 8

# An example that takes long says that the machine is busy.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in a test whatever ran before it."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {HERE / name: place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One process for each CPU that this one may use."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpus, MOST_PROCESSES)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole files, for the tests of one often share what was run once, in the order in which they were collected."""
    from xdist.scheduler import LoadFileScheduling

    if config.getoption("dist") != "load":
        return None  # what somebody asked for
    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)
