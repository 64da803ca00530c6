"""Pretrain a small transformer on bytes: FSDP2, torch.compile, checkpoints that resume on any number of ranks.

torchrun --nproc-per-node 2 examples/pretrain.py --out runs/bytes --steps 200
"""

import argparse
import math
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim.lr_scheduler import OneCycleLR

import spectrim


class Block(nn.Module):
    """Attention and a feed-forward network, each on normed input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, length, width) to the same, with heads 32 wide."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, -1, 32)).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.relu(self.up(self.norms[1](x))).square())


def sharded_model(args: argparse.Namespace, device: torch.device) -> nn.Sequential:
    """The model, compiled and sharded block by block. It has no positions: causal attention can count."""
    torch.manual_seed(0)
    blocks = [Block(args.width) for _ in range(args.depth)]
    model = nn.Sequential(nn.Embedding(256, args.width), *blocks, nn.RMSNorm(args.width), nn.Linear(args.width, 256))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for block in blocks:
        block.compile(backend=args.compile)
        fully_shard(block.to(device), mp_policy=policy)
    return fully_shard(model.to(device), mp_policy=policy)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: OneCycleLR) -> dict:
    """All that a run goes on from, under names that do not depend on the number of ranks."""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "schedule": schedule.state_dict()}


def main(args: argparse.Namespace) -> None:
    """Train from the latest checkpoint of the folder, or from the start."""
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(**{} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1})
    sources = sorted(Path(os.__file__).parent.glob("*.py"))  # Python's own library is text enough
    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in sources)), dtype=torch.uint8)
    model = sharded_model(args, device)
    thirds = {"*.qkv.weight": (args.width,) * 3}  # three matrices in one weight
    optimizer = spectrim.create(args.recipe, model, lr=args.lr, weight_decay=0.1, split=thirds)
    schedule = OneCycleLR(optimizer, [g["lr"] for g in optimizer.param_groups], args.steps, cycle_momentum=False)
    latest = max(args.out.glob("step-*/.metadata"), key=os.path.getmtime, default=None)  # written when all else is
    if latest:
        state = state_of(model, optimizer, schedule)
        dcp.load(state, checkpoint_id=latest.parent)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    for step in range(schedule.last_epoch, args.steps):
        generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
        starts = torch.randint(len(text) - args.length, (args.rows,), generator=generator).tolist()
        tokens = torch.stack([text[start : start + args.length + 1] for start in starts]).to(device, torch.long)
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % args.every == 0:
            dcp.save(state_of(model, optimizer, schedule), checkpoint_id=args.out / f"step-{step + 1}")
            dist.all_reduce(mean := loss.detach() / dist.get_world_size())
            if dist.get_rank() == 0:
                print(f"step {step + 1}: {mean.item() / math.log(2):.4f} bits a byte")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", default="adamw+clip", choices=spectrim.recipes(), metavar="RECIPE")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--compile", default="inductor" if torch.cuda.is_available() else "eager")
    for name, size in {"steps": 200, "every": 50, "rows": 16, "length": 256, "width": 128, "depth": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    main(parser.parse_args())
