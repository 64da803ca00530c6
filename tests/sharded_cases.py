"""The same optimizer on one process and on many: layouts, recipes, and the gradients that both are given."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import spectrim


def around(name: str, params, clip: float | None = 0.7, clip_scope="all", clip_form="soft", **options):
    """One of torch's optimizers with its updates clipped."""
    base = getattr(torch.optim, name)(params, lr=1e-2, **options)
    return spectrim.SpectralClipping(base, clip, clip_scope=clip_scope, clip_form=clip_form)


class Resting(torch.optim.Optimizer):
    """Does nothing in its first step, not even decay; then sign descent with decoupled decay."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 1e-2, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if self.state[parameter]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(parameter.grad.sign(), alpha=-group["lr"])
                self.state[parameter]["started"] = True


class Ahead(spectrim.Momentum):
    """Pre-clips ahead of its step, and halves gradients in between, as a bound on their global norm may."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        self.pre_clip_()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(0.5)
        super().step(closure)


RECIPES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda params: spectrim.AdamW(params, lr=1e-2),
    "adamw+clip": lambda params: spectrim.AdamW(params, lr=1e-2, clip=0.7),
    "adamw+clip, hard": lambda params: spectrim.AdamW(params, lr=1e-2, clip=0.7, clip_form="hard"),
    "adamw+shrink": lambda params: spectrim.AdamW(params, lr=1e-2, shrink=2.0),
    "adamw+shrink+preclip+clip": lambda params: spectrim.AdamW(
        params, lr=1e-2, shrink=2.0, pre_clip=0.5, clip=0.7, shrink_at="direction"
    ),
    "adamw+shrunk directions": lambda params: spectrim.AdamW(params, lr=1e-2, shrink=2.0, shrink_at="direction"),
    "signum+clip": lambda params: spectrim.Signum(params, lr=1e-3, clip=0.7),
    "mars": lambda params: spectrim.MARS(params, lr=1e-2, gamma=0.5),
    "mars+preclip+clip": lambda params: spectrim.MARS(params, lr=1e-2, gamma=0.5, pre_clip=0.5, clip=0.7),
    "pre-clipped ahead": lambda params: Ahead(params, lr=1e-2, pre_clip=0.5),
    "spectra": lambda params: spectrim.Spectra(params, lr=1e-2, rank_ratio=0.3),
    "spectra+clip": lambda params: spectrim.Spectra(params, lr=1e-2, rank_ratio=0.3, clip=0.1, clip_scope="all"),
    "muon+shrink": lambda params: spectrim.Muon(params, lr=1e-2, shrink=2.0),
    "around AdamW": lambda params: around("AdamW", params, weight_decay=0.1),
    "around AdamW, nothing clipped": lambda params: around("AdamW", params, clip=None),
    "around NAdam, matrices": lambda params: around("NAdam", params, clip_scope="matrices", clip_form="hard"),
    "around SGD": lambda params: around("SGD", params, momentum=0.9, weight_decay=0.1, clip_form="hard"),
    "around one that rests first": lambda params: spectrim.SpectralClipping(Resting(params), 0.7),
    "muon": lambda params: spectrim.Muon(params, lr=1e-2),
}

SHAPES = {
    "wide": (8, 12),
    "tall": (16, 6),
    "uneven": (7, 10),
    "tiny": (2, 5),
    "stored transposed": (12, 9),
    "fused": (12, 6),
    "turns": (20, 6),
    "alternating": (4, 5, 12),
    "experts": (4, 6, 8),
    "convolution": (6, 2, 2, 2),
    "bias": (10,),
    "short": (3,),
}
GROUPS = [
    {"names": ["wide", "tall", "uneven", "tiny"], "role": "matrix", "layout": "matrix"},
    {"names": ["stored transposed"], "role": "matrix", "layout": "transposed"},
    {"names": ["fused"], "role": "matrix", "layout": "matrix", "split": (6, 3, 3)},
    {"names": ["turns"], "role": "matrix", "layout": "matrix", "split": ("interleaved", 6, 2, 2)},
    {"names": ["alternating"], "role": "matrix", "layout": "transposed_stack", "split": ("interleaved", 1, 1)},
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


def placed(mesh: DeviceMesh, choose: Callable[[str], list | None]) -> dict[str, nn.Parameter]:
    """Every parameter with the placements chosen for it; a plain one where none are."""
    return {
        name: nn.Parameter(distribute_tensor(tensor, mesh, placements) if (placements := choose(name)) else tensor)
        for name, tensor in start().items()
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
    yield "mixed", lambda: placed(flat, lambda name: [Shard(0)] if name in ("wide", "fused", "turns", "bias") else None)
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


def like(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """A tensor laid out as a parameter; every rank has the whole."""
    if not isinstance(parameter, DTensor):
        return whole
    if not any(type(p).__name__ == "_StridedShard" for p in parameter.placements):
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    from spectrim.distributed.collectives import team_of
    from spectrim.distributed.intervals import take
    from spectrim.distributed.sharding import sharding_of

    region = sharding_of(parameter, "").region(team_of(parameter.device_mesh).member)
    return DTensor.from_local(
        take(whole, region).contiguous(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


#: What is done to gradients in place, and what it finds.
UTILITIES: dict[str, Callable[[list[dict]], tuple[Tensor, ...]]] = {
    "clip": lambda groups: (spectrim.clip_grad_spectral_(groups, 0.3, vectors=True),),
    "clip, hard": lambda groups: (spectrim.clip_grad_spectral_(groups, 0.5, form="hard"),),
    "shrink": lambda groups: tuple(spectrim.shrink_grad_(groups, 2.0)),
}


def single_gradients(utility: str, names: list[str]) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """The gradients that a utility leaves in one process, and what it found."""
    parameters = {name: nn.Parameter(torch.zeros(SHAPES[name])) for name in names}
    for name, parameter in parameters.items():
        parameter.grad = gradient(name, 0)
    found = UTILITIES[utility](groups(parameters))
    return {name: parameter.grad for name, parameter in parameters.items()}, found


def step(optimizer, parameters: dict[str, nn.Parameter], number: int) -> None:
    for name, parameter in parameters.items():
        parameter.grad = like(parameter, gradient(name, number))
    optimizer.step()


def whole(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {
        name: parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
        for name, parameter in parameters.items()
    }
