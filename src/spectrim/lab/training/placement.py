"""Spreads a model over ranks with torch's FSDP2, DistributedDataParallel or tensor parallelism.

Every rank builds the same whole model from the run's seed and keeps its part; parameters keep their names. The
optimizer is built afterwards.
"""

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.nn.parallel import DistributedDataParallel

from spectrim.lab.errors import LabError
from spectrim.lab.training.processes import Parallel

__all__ = ["reshard", "spread", "whole_state"]

STYLES: dict[str, type[ColwiseParallel] | type[RowwiseParallel]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
}
"""The styles of transformers' tensor-parallel plans that are supported."""


def spread(model: nn.Module, parallel: Parallel, device: torch.device) -> nn.Module:
    """Move a model to the device and keep this rank's part of it; returns the module to call in training.

    Raises:
        LabError: the model's architecture, or the number of ranks, does not fit the mode.
    """
    if parallel.ranks == 1:
        return model.to(device)
    if parallel.mode == "ddp":
        ids = [device] if device.type == "cuda" else None
        return DistributedDataParallel(model.to(device), device_ids=ids)
    if parallel.mode == "tp":
        check_tensor_parallel(model, parallel.ranks)
        plan: dict[str, ParallelStyle] = {name: STYLES[style]() for name, style in tensor_plan(model).items()}
        base: Any = model.base_model
        parallelize_module(base, init_device_mesh(device.type, (parallel.ranks,)), plan)
        return model.to(device)
    mesh = (
        hybrid_mesh(parallel, device) if parallel.mode == "hsdp" else init_device_mesh(device.type, (parallel.ranks,))
    )
    # Shard block by block, so that only one at a time is whole; this also moves it to the mesh's device.
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def hybrid_mesh(parallel: Parallel, device: torch.device) -> DeviceMesh:
    """Shards within a machine, replicas across machines; on one machine, two replicas."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", parallel.ranks))
    shards = local if local < parallel.ranks else parallel.ranks // 2
    if parallel.ranks % shards or (local == parallel.ranks and parallel.ranks % 2):
        raise LabError(
            f"--parallel hsdp on {parallel.ranks} ranks: expected machines of equally many, or on one machine an even "
            f"number"
        )
    return init_device_mesh(device.type, (parallel.ranks // shards, shards), mesh_dim_names=("replicate", "shard"))


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The model's layers, as transformers names them."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return (module for module in model.modules() if type(module).__name__ in names)


def tensor_plan(model: nn.Module) -> dict[str, str]:
    """The linear layers that are split by columns or by rows, from transformers' plan for the architecture."""
    config: Any = model.config
    return dict(getattr(config, "base_model_tp_plan", None) or {})


def check_tensor_parallel(model: nn.Module, ranks: int) -> None:
    config: Any = model.config
    plan = tensor_plan(model)
    foreign = sorted(set(plan.values()) - STYLES.keys())
    if not plan or foreign:
        reason = f"its plan has {', '.join(foreign)}" if foreign else "transformers has no plan for it"
        raise LabError(
            f"--parallel tp does not serve the architecture {config.model_type!r}: {reason}; expected one like llama, "
            f"or --parallel fsdp"
        )
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if (size := getattr(config, key, None)) is not None and size % ranks:
            raise LabError(f"--parallel tp on {ranks} ranks: {key}={size} of the model is not a multiple of {ranks}")


def reshard(model: nn.Module) -> None:
    """Free the gathered weights that remain after a forward pass without a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_state(model: nn.Module) -> dict[str, Any]:
    """The whole state dict in rank 0's main memory, empty on other ranks. All ranks take part."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)
