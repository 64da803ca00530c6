"""What each of four ranks runs that step every recipe, sharded, and record the bytes they send."""

import copy
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from spectrim.lab.models.build import build_model
from spectrim.lab.planning.plan import optimizer_on_meta
from spectrim.lab.planning.scaling import cost, read_work
from spectrim.lab.planning.settings import Cluster

RANKS = 4
CLUSTERS = {
    "fsdp": (Cluster(world=RANKS), (RANKS,)),
    "hsdp": (Cluster(world=RANKS, parallel="hsdp", shard=2), (2, 2)),
}
RECIPES = ("adamw+shrink", "signum+clip", "adamw+preclip+clip", "spectra", "spectra+clip", "muon")


def dense() -> nn.Module:
    return build_model("1m", vocabulary_size=512, sequence_length=16, seed=0)


def mixture() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        hidden_size=128,
        intermediate_size=192,
        moe_intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        vocab_size=256,
    )
    torch.manual_seed(0)
    built: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return built


def recorded(model: nn.Module, recipe: str, mesh: DeviceMesh) -> dict[str, float]:
    """The second step's bytes, by purpose; the first step follows a spike from nothing and compares options."""
    from spectrim.distributed.collectives import record

    fully_shard(model, mesh=mesh)
    optimizer = optimizer_on_meta(model, "sharded", recipe)
    for _ in range(2):
        for parameter in model.parameters():
            grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            parameter.grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements, src_data_rank=None)
        with record() as recorder:
            optimizer.step()
    return recorder.sent


def everything(rank: int) -> list[dict[str, Any]]:
    """For every layout, model and recipe, what the cost model says and what was recorded on each rank."""
    rows: list[dict[str, Any]] = []
    models = (dense(), mixture())
    for parallel, (cluster, shape) in CLUSTERS.items():
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        for name, model in zip(("dense", "mixture"), models, strict=True):
            for recipe in RECIPES:
                sent: list[Any] = [None] * RANKS
                dist.all_gather_object(sent, recorded(copy.deepcopy(model), recipe, mesh))
                row = {"parallel": parallel, "model": name, "recipe": recipe, "recorded": sent}
                if rank == 0:
                    said = cost(read_work(optimizer_on_meta(model, "whole", recipe)), cluster)
                    row["projected"] = said.bytes_sent
                rows.append(row)
    return rows
