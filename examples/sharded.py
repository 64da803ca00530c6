"""One optimizer, every layout: ddp, fsdp, hsdp, tp, fsdp+tp, experts.

torchrun --nproc-per-node 4 examples/sharded.py fsdp
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import spectrim


class Experts(nn.Module):
    """Two experts for every rank, each a matrix, all of which see every input."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, 16, 16) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The mean over experts of what each makes of x."""
        weight = self.weight.to_local() if hasattr(self.weight, "to_local") else self.weight
        return torch.einsum("eij,bj->bi", weight, x) / len(weight)


def build(layout: str, world: int) -> tuple[nn.Module, list[nn.Parameter] | list[dict]]:
    """A model in a layout, and its parameters as an optimizer takes them."""
    torch.manual_seed(0)
    if layout == "experts":
        model: nn.Module = Experts(2 * world)
        placed = distribute_tensor(model.weight.detach(), init_device_mesh("cpu", (world,)), [Shard(0)])
        model.weight = nn.Parameter(placed)
        return model, [model.weight]
    model = nn.Sequential(nn.Linear(16, 60), nn.ReLU(), nn.Linear(60, 16))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    if layout == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
        return wrapped, spectrim.param_groups(wrapped)
    if layout == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    elif layout == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
    elif layout == "tp":
        parallelize_module(model, init_device_mesh("cpu", (world,)), plan)
    elif layout == "fsdp+tp":
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], plan)
        fully_shard(model, mesh=mesh["dp"])
    else:
        raise SystemExit(f"layout {layout!r}: expected ddp, fsdp, hsdp, tp, fsdp+tp or experts")
    return model, spectrim.param_groups(model)


def main() -> None:
    """Fit a linear map for a few steps, and print the loss."""
    dist.init_process_group("gloo")
    layout = sys.argv[1] if len(sys.argv) > 1 else "fsdp"
    model, params = build(layout, dist.get_world_size())
    optimizer = spectrim.AdamW(params, lr=1e-2, clip=1.0)
    target = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    for step in range(50):
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x @ target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9 and dist.get_rank() == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
