"""What the ranks of tests/monitor/test_sharded.py run, and the same on one process."""

import json

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import sharded_cases as cases
import spectrim
from spectrim.monitor import Callback

ROWS = 8
LAYOUTS = {2: ("fsdp", "columns", "replicated"), 4: ("hsdp", "fsdp+tp", "blocks", "experts and their columns")}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(30, 16)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 26), nn.Tanh(), nn.Linear(26, 16)) for _ in range(2)])
        self.lm_head = nn.Linear(16, 30, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.lm_head(x)


def train(model, *, part=(0, 1), steps=5):
    """The records of a model that is trained on this part of the rows of each batch, in two micro-batches."""
    records: list[dict] = []
    rank, ranks = part
    optimizer = spectrim.AdamW(spectrim.param_groups(model), lr=1e-2, clip=0.8, clip_scope="all")
    parameters = list(model.parameters())
    kinds = [[p for p in parameters if isinstance(p, DTensor) == sharded] for sharded in (True, False)]
    monitor = spectrim.SpectralMonitor(model, optimizer, 2, out=Callback(records.append), exact_steps=[4])
    for number in range(steps):
        tokens = torch.randint(30, (ROWS, 6), generator=torch.Generator().manual_seed(number))
        for rows in tokens.view(2, ROWS // 2, 6):
            mine = rows.chunk(ranks)[rank]
            logits = model(mine[:, :-1])
            (nn.functional.cross_entropy(logits.flatten(0, 1), mine[:, 1:].flatten()) / 2).backward()
        norms = [nn.utils.get_total_norm([p.grad for p in kind]) for kind in kinds if kind]
        norm = torch.stack([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]).norm()
        for kind in kinds:
            nn.utils.clip_grads_with_norm_(kind, 0.1, norm)
        optimizer.step()
        optimizer.zero_grad()
    monitor.close()
    return records


def plain():
    return train(Network())


def data_parallel(rank: int, world: int):
    return train(DistributedDataParallel(Network()), part=(rank, world))


def fully_sharded(rank: int, world: int):
    model = Network()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return train(model, part=(rank, world))


def tensor_parallel(rank: int, world: int):
    model = Network()
    mesh = init_device_mesh("cpu", (world,))
    for block in model.blocks:
        parallelize_module(block, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return train(model)


def given(parameters, step):
    """The records of parameters that are given their gradients; each record has what was watched too."""
    records: list[dict] = []
    optimizer = cases.RECIPES["adamw+clip"](cases.groups(parameters))
    model = nn.Module()
    for name, parameter in parameters.items():
        model.register_parameter(name.replace(" ", "_"), parameter)
    watched = {}
    monitor = spectrim.SpectralMonitor(
        model,
        optimizer,
        2,
        out=Callback(records.append),
        exact_steps=[2],
        exact="wide",
        alarm=lambda step, values: watched.update({step: {k: v["update_rms"] for k, v in values.items()}}),
    )
    for number in range(4):
        step(optimizer, parameters, number)
    monitor.close()
    for record in records:
        record["watched"] = watched[record["step"]]
    return records


def given_plain():
    def step(optimizer, parameters, number):
        for name, parameter in parameters.items():
            parameter.grad = cases.gradient(name, number)
        optimizer.step()

    return given({name: nn.Parameter(tensor) for name, tensor in cases.start().items()}, step)


def everything(rank: int, world: int):
    found = {name: given(make(), cases.step) for name, make in cases.layouts(world) if name in LAYOUTS[world]}
    if world == 2:
        found["DDP"] = data_parallel(rank, world)
        found["FSDP2"] = fully_sharded(rank, world)
        found["tensor parallel"] = tensor_parallel(rank, world)
    return json.dumps(found)
