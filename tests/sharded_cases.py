"""The same optimizer on one process and on many: layouts, recipes, and the gradients that both are given."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import spectrim

RECIPES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda params: spectrim.AdamW(params, lr=1e-2),
    "adamw+clip": lambda params: spectrim.AdamW(params, lr=1e-2, clip=0.7),
    "adamw+clip, hard": lambda params: spectrim.AdamW(params, lr=1e-2, clip=0.7, clip_form="hard"),
    "adamw+shrink": lambda params: spectrim.AdamW(params, lr=1e-2, shrink=2.0),
    "adamw+shrink+preclip+clip": lambda params: spectrim.AdamW(
        params, lr=1e-2, shrink=2.0, pre_clip=0.5, clip=0.7, shrink_at="direction"
    ),
    "signum+clip": lambda params: spectrim.Signum(params, lr=1e-3, clip=0.7),
    "spectra": lambda params: spectrim.Spectra(params, lr=1e-2, rank_ratio=0.3),
    "spectra+clip": lambda params: spectrim.Spectra(params, lr=1e-2, rank_ratio=0.3, clip=0.1, clip_scope="all"),
    "muon": lambda params: spectrim.Muon(params, lr=1e-2),
}

SHAPES = {
    "wide": (8, 12),
    "tall": (16, 6),
    "uneven": (7, 10),
    "tiny": (2, 5),
    "stored transposed": (12, 9),
    "fused": (12, 6),
    "experts": (4, 6, 8),
    "convolution": (6, 2, 2, 2),
    "bias": (10,),
    "short": (3,),
}
GROUPS = [
    {"names": ["wide", "tall", "uneven", "tiny"], "role": "matrix", "layout": "matrix"},
    {"names": ["stored transposed"], "role": "matrix", "layout": "transposed"},
    {"names": ["fused"], "role": "matrix", "layout": "matrix", "split": (6, 3, 3)},
    {"names": ["experts"], "role": "matrix", "layout": "stack"},
    {"names": ["convolution"], "role": "matrix", "layout": "flatten"},
    {"names": ["bias", "short"], "role": "vector", "layout": "vector"},
]


def seeded(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(n * 1009**i for i, n in enumerate(numbers)))


def start(names: list[str] | None = None) -> dict[str, Tensor]:
    return {name: torch.randn(SHAPES[name], generator=seeded(7, len(name))) for name in names or SHAPES}


def gradient(name: str, step: int) -> Tensor:
    """A gradient with a spike over its tail that turns slowly."""
    shape = SHAPES[name]
    grad = torch.randn(shape, generator=seeded(step, len(name), shape[0])) * 0.1
    if len(shape) > 1:
        left = torch.randn(shape[:-1], generator=seeded(1, len(name))).unsqueeze(-1)
        right = torch.randn(shape[-1], generator=seeded(2, len(name)))
        grad += left * right
    return grad


def groups(parameters: dict[str, nn.Parameter]) -> list[dict]:
    return [
        {**{k: v for k, v in group.items() if k != "names"}, "params": [(n, parameters[n]) for n in names]}
        for group in GROUPS
        if (names := [n for n in group["names"] if n in parameters])
    ]


class Holder(nn.Module):
    """A model of nothing but parameters, for ``fully_shard``."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.held = nn.ParameterDict({name.replace(" ", "_"): nn.Parameter(t) for name, t in tensors.items()})

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        return {name.replace("_", " "): parameter for name, parameter in self.held.items()}


def single(recipe: str, steps: int, names: list[str] | None = None) -> dict[str, Tensor]:
    """The parameters after so many steps of one process."""
    parameters = {name: nn.Parameter(tensor) for name, tensor in start(names).items()}
    optimizer = RECIPES[recipe](groups(parameters))
    for step in range(steps):
        for name, parameter in parameters.items():
            parameter.grad = gradient(name, step)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def placed(mesh: DeviceMesh, choose: Callable[[str], list]) -> dict[str, nn.Parameter]:
    return {
        name: nn.Parameter(distribute_tensor(tensor, mesh, placements))
        for name, tensor in start().items()
        if (placements := choose(name)) is not None
    }


def fsdp(mesh: DeviceMesh, **options) -> dict[str, nn.Parameter]:
    holder = Holder(start())
    fully_shard(holder, mesh=mesh, **options)
    return holder.parameters_by_name()


def is_vector(name: str) -> bool:
    return len(SHAPES[name]) == 1


def strided(mesh: DeviceMesh) -> dict[str, nn.Parameter]:
    """FSDP2 over tensor parallelism: rows, columns, or nothing of each split first."""
    sharded = {"wide": Shard(0), "tall": Shard(1), "stored transposed": Shard(0), "fused": Shard(0), "bias": Shard(0)}
    sharded |= {"experts": Shard(1), "uneven": Shard(1)}
    tensors = start()
    holder = Holder({})
    for name, tensor in tensors.items():
        placed = distribute_tensor(tensor, mesh["tp"], [sharded.get(name, Replicate())])
        holder.held[name.replace(" ", "_")] = nn.Parameter(placed)
    fully_shard(holder, mesh=mesh["dp"])
    return holder.parameters_by_name()


def layouts(world: int) -> Iterator[tuple[str, Callable[[], dict[str, nn.Parameter]]]]:
    """Every layout that a world of this size can have, with what makes its parameters."""
    flat = init_device_mesh("cpu", (world,))
    yield "replicated", lambda: placed(flat, lambda name: [Replicate()])
    yield "fsdp", lambda: fsdp(flat)
    yield "rows", lambda: placed(flat, lambda name: [Shard(0)])
    yield "columns", lambda: placed(flat, lambda name: [Shard(0 if is_vector(name) else len(SHAPES[name]) - 1)])
    if world < 4:
        return
    grid = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    yield "hsdp", lambda: fsdp(grid)
    yield "fsdp+tp", lambda: strided(grid)
    yield (
        "blocks",
        lambda: placed(grid, lambda name: [Shard(0), Replicate() if is_vector(name) else Shard(1)]),
    )
    yield (
        "replicas of columns",
        lambda: placed(grid, lambda name: [Replicate(), Shard(0 if is_vector(name) else 1)]),
    )
    yield "rows twice", lambda: placed(grid, lambda name: [Shard(0), Shard(0)])
    yield (
        "experts and their columns",
        lambda: placed(grid, lambda name: [Shard(0), Shard(2)] if name == "experts" else [Shard(0), Replicate()]),
    )


def like(parameter: nn.Parameter, whole: Tensor) -> DTensor:
    """A tensor laid out as a parameter; every rank has the whole."""
    if not any(type(p).__name__ == "_StridedShard" for p in parameter.placements):
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    from spectrim.distributed.collectives import team_of
    from spectrim.distributed.runs import take
    from spectrim.distributed.sharding import sharding_of

    region = sharding_of(parameter, "").regions[team_of(parameter.device_mesh).member]
    return DTensor.from_local(
        take(whole, region).contiguous(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def step(optimizer, parameters: dict[str, nn.Parameter], number: int) -> None:
    for name, parameter in parameters.items():
        parameter.grad = like(parameter, gradient(name, number))
    optimizer.step()


def whole(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().full_tensor() for name, parameter in parameters.items()}
