"""Measures how a step's host work depends on the number of ranks, in one process.

    python benchmarks/ranks.py [--ranks 1,8,64,512,4096] [--models "GPT-2 small"] [--recipes adamw+clip] [--json FILE]

One rank of a world of fake processes steps on weights without memory (device "meta"), so nothing is computed and
nothing is sent: what is left is what the host does. Each world is a process of its own. "first" is the first step,
which plans messages; "step" is the median of later ones; "calls" counts how often one of them enters a function of
spectrim, generators included. Milliseconds are of processor time, on one thread, and most of them are torch's Python
for this device: read how they grow.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from time import process_time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import spectrim
from spectrim.distributed.collectives import Team
from spectrim.lab.files import write_json

RECIPES = {
    "adamw+clip": lambda groups: spectrim.AdamW(groups, lr=1e-3, clip=5.0, clip_scope="all"),
    "spectra": lambda groups: spectrim.Spectra(groups, lr=1e-3),
}
#: One matrix of each kind in a layer; how many layers; what stands beside them.
MODELS: dict[str, tuple[list[tuple[int, int]], int, tuple[int, int]]] = {
    "GPT-2 small": ([(2304, 768), (768, 768), (3072, 768), (768, 3072)], 12, (50257, 768)),
    "Llama 1B": ([(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), *2 * [(8192, 2048)], (2048, 8192)], 16, (0, 0)),
}
REPLICAS = 8
LAYOUTS = ("FSDP2", "HSDP")
STEPS = 3


def shapes(model: str) -> list[tuple[int, ...]]:
    matrices, layers, table = MODELS[model]
    width = matrices[0][1]
    return [*(layers * [*matrices, (width,), (width,)]), *([table] if table[0] else [])]


def placed(shape: tuple[int, ...], mesh: Any, placements: list[Any]) -> nn.Parameter:
    """A parameter of which this rank, the first, has its rows, by torch.chunk's rule."""
    parts = mesh.size(mesh.ndim - 1)
    local = torch.empty(-(-shape[0] // parts), *shape[1:], device="meta")
    stride = torch.empty(shape, device="meta").stride()
    whole = DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
    return nn.Parameter(whole)


def calls(function: Any) -> int:
    """How often a call enters a Python function of spectrim, or goes on with a generator of it."""
    count = 0
    source = str(Path(spectrim.__file__).parent)

    def profile(frame: Any, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(source)

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def measured(model: str, layout: str, recipe: str, ranks: int) -> dict[str, Any]:
    """One cell of the table; this process has to be part of the fake world already."""
    if layout == "HSDP":
        mesh = init_device_mesh("meta", (REPLICAS, ranks // REPLICAS))
        placements = [Replicate(), Shard(0)]
    else:
        mesh, placements = init_device_mesh("meta", (ranks,)), [Shard(0)]
    parameters = [placed(shape, mesh, placements) for shape in shapes(model)]
    optimizer = RECIPES[recipe](parameters)
    seconds = []
    for _ in range(STEPS + 1):
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        begin = process_time()
        optimizer.step()
        seconds.append(process_time() - begin)
    return {
        "model": model,
        "layout": layout,
        "recipe": recipe,
        "ranks": ranks,
        "first_ms": seconds[0] * 1e3,
        "step_ms": statistics.median(seconds[1:]) * 1e3,
        "calls": calls(optimizer.step),
    }


def in_world(ranks: int, models: list[str], recipes: list[str]) -> None:
    """Print all cells of one number of ranks, a line each."""
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    # Nobody answers: everyone is taken to say what this rank says.
    Team.gather_objects = lambda team, value: [value] * team.size  # type: ignore[method-assign]
    for model in models:
        for layout in LAYOUTS:
            if layout == "FSDP2" or ranks >= REPLICAS:
                for recipe in recipes:
                    print(json.dumps(measured(model, layout, recipe, ranks)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,8,64,512,4096", help="numbers of ranks, with commas between")
    parser.add_argument("--models", default=",".join(MODELS), help="models, with commas between")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="recipes, with commas between")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--world", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.world:
        in_world(arguments.world, arguments.models.split(","), arguments.recipes.split(","))
        return
    rows: list[dict[str, Any]] = []
    print(f"{'model':12} {'layout':6} {'recipe':11} {'ranks':>6} {'first ms':>9} {'step ms':>9} {'calls':>9}")
    for ranks in map(int, arguments.ranks.split(",")):
        command = [sys.executable, __file__, "--world", str(ranks)]
        command += ["--models", arguments.models, "--recipes", arguments.recipes]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as world:
            assert world.stdout is not None
            for line in world.stdout:
                row = json.loads(line)
                rows.append(row)
                print(
                    f"{row['model']:12} {row['layout']:6} {row['recipe']:11} {row['ranks']:6} {row['first_ms']:9.1f} "
                    f"{row['step_ms']:9.1f} {row['calls']:9}",
                    flush=True,
                )
        if world.returncode:
            raise SystemExit(f"the world of {ranks} ranks ended with {world.returncode}")
    if arguments.json:
        write_json(arguments.json, {"torch": torch.__version__, "threads": 1, "rows": rows})


if __name__ == "__main__":
    main()
