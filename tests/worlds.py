"""Several processes for one test: a function runs on every rank of a gloo world, and what it returns comes back."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What the function, of a module that children can import, returned on each rank. It takes (rank, *arguments)."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_on_rank, (world, folder, function, arguments), nprocs=world)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _on_rank(rank: int, world: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        torch.save(function(rank, *arguments), Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
