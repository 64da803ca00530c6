"""What a case of fuzz.py is: all that its number draws, and the parameters, optimizer and gradients made of it."""

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import spectrim

SIDES = (1, 1, 2, 3, 4, 6, 8, 12, 17, 33, 64, 65, 70, 96)
#: Kinds of gradients and how often they come. What no clip bounds is kept where float32 holds its square.
KINDS = {
    "ordinary": 8,
    "low rank": 2,
    "spiked": 2,
    "sparse": 1,
    "zero": 1,
    "denormal": 1,
    "tiny": 1,
    "large": 1,
    "missing": 1,
    "huge": 0.4,
    "one inf": 0.4,
    "one nan": 0.4,
    "all nan": 0.2,
}
BAD = ("huge", "one inf", "one nan", "all nan")
OURS = ("AdamW", "AdamW", "Signum", "AdEMAMix", "Momentum", "Spectra", "Muon")
BASES = {
    "AdamW": {"weight_decay": 0.1},
    "NAdam": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "Adam": {"weight_decay": 0.05},
    "SGD": {"momentum": 0.9, "weight_decay": 0.05},
    "RMSprop": {},
    "Adagrad": {},
}


class Case:
    """Everything that a number stands for."""

    def __init__(self, number: int, mesh: DeviceMesh) -> None:
        self.rng = random.Random(number)
        self.mesh = mesh
        self.generator = torch.Generator().manual_seed(number)
        self.steps = self.rng.randint(3, 12)
        self.wrapped = self.rng.random() < 0.2
        self.recipe = self.rng.choice(list(BASES)) if self.wrapped else self.rng.choice(OURS)
        self.lr = 10 ** self.rng.uniform(-6, 0)
        self.raises = self.rng.random() < 0.1
        # As on an accelerator: nothing is read that would make the host wait.
        self.unread = self.rng.random() < 0.3
        self.lr_in_a_tensor = self.rng.random() < 0.25
        self.options = self.draw_options()
        dtype = self.rng.choice([torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16])
        if self.name in ("around NAdam", "around Adagrad"):
            # torch's own loading casts what they keep beside moments to the weight's dtype.
            dtype = torch.float32
        self.groups = [self.draw_group(dtype) for _ in range(self.rng.randint(1, 3))]
        self.plan = [self.draw_step() for _ in range(self.steps)]
        self.interruption = self.rng.choice(["saved", "saved", "copied", "pickled", "none"])
        if self.interruption == "copied" and any(
            p["memory"] == "strided" for g in self.groups for p in g["parameters"]
        ):
            # torch's copies of memory with holes have none, and sums of other strides other roundings.
            self.interruption = "saved"
        self.interrupted_after = self.rng.randrange(self.steps)
        self.utility = self.rng.choice([None, None, None, None, "clip", "shrink"])

    @property
    def name(self) -> str:
        return f"around {self.recipe}" if self.wrapped else self.recipe

    def maybe(self, probability: float, value: Any) -> Any:
        return value if self.rng.random() < probability else None

    def draw_options(self) -> dict[str, Any]:
        rng = self.rng
        options: dict[str, Any] = {"on_nonfinite": "raise" if self.raises else "skip"}
        clip = rng.choice([None, "auto", "auto", 10 ** rng.uniform(-3, 3)])
        options["precision"] = rng.choice(["auto", "exact"])
        options["clip_form"] = rng.choice(["soft", "soft", "hard"])
        options["clip_scope"] = rng.choice(["all", "matrices"])
        if rng.random() < 0.3:
            options["warmup_steps"] = rng.randint(1, 6)
        if rng.random() < 0.3:
            options["total_steps"] = rng.randint(4, 20)
            options["clip_decay"] = rng.choice(["linear", "cosine", "sqrt", "square", "exponential", "constant"])
            options["clip_decay_fraction"] = rng.uniform(0.1, 1.0)
        if self.wrapped:
            return {"clip": clip, **options}
        options["shrink"] = rng.choice([None, None, "auto", 10 ** rng.uniform(-1, 1)])
        options["shrink_at"] = rng.choice(["gradient", "direction"])
        options["shrink_form"] = rng.choice(["redescending", "monotone", "hard"])
        options["state_dtype"] = rng.choice([None, None, "bfloat16", "float32"])
        options["maximize"] = rng.random() < 0.2
        options["weight_decay"] = rng.choice([0.0, 0.1, 1.0])
        if self.recipe != "Muon":
            options["clip"] = clip
        if self.recipe not in ("Muon", "Spectra"):
            options["pre_clip"] = self.maybe(0.3, 10 ** rng.uniform(-3, 2))
        if self.recipe in ("Signum", "Momentum", "Muon"):
            options["nesterov"] = rng.random() < 0.5
            options["momentum"] = rng.choice([0.0, 0.5, 0.95])
        if self.recipe == "Muon":
            options["scale"] = rng.choice(["match_rms_adamw", "original"])
            options["orthogonalize_steps"] = self.maybe(0.3, rng.randint(3, 7))
        if self.recipe == "Spectra":
            options["rank_ratio"] = rng.choice([0.015, 0.3, 1.0])
        return options

    def draw_group(self, dtype: torch.dtype) -> dict[str, Any]:
        """Shapes and memory of some parameters, and what their group says of them."""
        rng = self.rng
        layout = rng.choice(["matrix", "matrix", "transposed", "stack", "transposed_stack", "flatten", "vector", None])
        role = (
            None if layout is None else "vector" if layout == "vector" else rng.choice(["matrix", "embedding", "head"])
        )
        period = rng.choice([(1, 1), (2, 1), (4, 2, 2)])
        split = rng.choice([None, None, "plain", "interleaved"]) if layout not in ("vector", None) else None
        parameters = []
        for _ in range(rng.randint(1, 3)):
            m, n, depth = rng.choice(SIDES), rng.choice(SIDES), rng.choice([1, 2, 3])
            if split:
                m = sum(period) * rng.randint(1, 6) if split == "interleaved" else sum(period)
            elif rng.random() < 0.04:
                m, n = rng.choice([(0, n), (m, 0)])
            shape: tuple[int, ...] = {
                "matrix": (m, n),
                "transposed": (n, m),
                "stack": (depth, m, n),
                "transposed_stack": (depth, n, m),
                "flatten": (m, min(n, 4), 2, 2),
                "vector": rng.choice([(m,), (m, n), ()]),
                None: rng.choice([(m,), (m, n), (depth, m, n), (m, 2, 2, 2)]),
            }[layout]
            memory = rng.choice(["contiguous", "contiguous", "contiguous", "turned", "strided", "shard", "replica"])
            parameters.append({"shape": shape, "dtype": dtype, "memory": memory})
        said = {"role": role, "layout": layout}
        if split:
            said["split"] = period if split == "plain" else ("interleaved", *period)
        if rng.random() < 0.2:
            said["lr"] = self.lr * 10 ** rng.uniform(-1, 1)
        if rng.random() < 0.15 and not self.wrapped:
            said["weight_decay"] = rng.choice([0.0, 0.5])
        return {"parameters": parameters, "said": {key: value for key, value in said.items() if value is not None}}

    def draw_step(self) -> dict[str, Any]:
        rng = self.rng
        count = sum(len(group["parameters"]) for group in self.groups)
        bad = rng.random() < 0.25
        kinds = [kind for kind in KINDS if bad or kind not in BAD]
        return {
            "kinds": rng.choices(kinds, [KINDS[kind] for kind in kinds], k=count),
            "scale": 10 ** rng.uniform(-8, 4),
            # Beyond the peak only where the peak is followed: see docs/groups.md.
            "lr": rng.choice([1.0, 1.0, 1.0, 0.3, 1.0 if self.unread and self.lr_in_a_tensor else 3.0, 0.0]),
            "seed": rng.randrange(2**31),
        }

    # -- Made from it --

    def parameters(self) -> list[list[nn.Parameter]]:
        generator = torch.Generator().manual_seed(self.generator.initial_seed())
        return [
            [nn.Parameter(self.placed(torch.randn(p["shape"], generator=generator), p)) for p in group["parameters"]]
            for group in self.groups
        ]

    def placed(self, whole: Tensor, drawn: dict[str, Any]) -> Tensor:
        whole, memory = whole.to(drawn["dtype"]), drawn["memory"]
        if memory == "turned" and whole.ndim == 4:
            return whole.to(memory_format=torch.channels_last)
        if memory == "turned" and whole.ndim > 1:
            return whole.transpose(-1, -2).contiguous().transpose(-1, -2)
        if memory == "strided" and whole.ndim:
            padded = whole.new_zeros((*whole.shape[:-1], 2 * whole.shape[-1]))
            padded[..., ::2] = whole
            return padded[..., ::2]
        if memory in ("shard", "replica"):
            return distribute_tensor(whole, self.mesh, [Shard(0) if memory == "shard" and whole.ndim else Replicate()])
        return whole

    def optimizer(self, parameters: list[list[nn.Parameter]]) -> torch.optim.Optimizer:
        groups = [{"params": list(held), **group["said"]} for held, group in zip(parameters, self.groups, strict=True)]
        lr = torch.tensor(self.lr) if self.lr_in_a_tensor else self.lr
        if not self.wrapped:
            return getattr(spectrim, self.recipe)(groups, lr=lr, **self.options)
        base = getattr(torch.optim, self.recipe)(groups, lr=self.lr, **BASES[self.recipe])
        return spectrim.SpectralClipping(base, **self.options)

    def gradient(self, parameter: nn.Parameter, kind: str, scale: float, generator: torch.Generator) -> Tensor | None:
        shape = parameter.shape
        grad = torch.randn(shape, generator=generator)
        if kind == "missing":
            return None
        if kind == "low rank" and grad.ndim > 1:
            grad = grad[..., :1] * grad[..., :1, :] if grad.numel() else grad
        if kind == "spiked" and grad.ndim > 1 and grad.numel():
            grad = grad + 1e3 * grad[..., :1] * grad[..., :1, :]
        if kind == "sparse":
            grad = grad * (torch.rand(shape, generator=generator) < 0.02)
        grad = grad * {"zero": 0.0, "denormal": 1e-42, "tiny": 1e-25, "large": 1e8, "huge": 1e30}.get(kind, scale)
        if kind == "all nan":
            grad = torch.full(shape, torch.nan)
        if kind in ("one inf", "one nan") and grad.numel():
            place = int(torch.randint(grad.numel(), (), generator=generator))
            grad.view(-1)[place] = float(kind.removeprefix("one "))
        grad = grad.to(parameter.dtype)
        if isinstance(parameter, DTensor):
            return distribute_tensor(grad, self.mesh, parameter.placements)
        if kind == "ordinary" and scale > 1 and grad.ndim > 1:  # in other strides than the weight's
            return grad.transpose(0, -1).contiguous().transpose(0, -1)
        return grad
