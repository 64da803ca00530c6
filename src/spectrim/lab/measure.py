"""What a finished run is measured by, beside its losses: state, weights, medians of its times, and where it ran."""

import os
import platform
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.lab.config import Precision
from spectrim.lab.errors import LabError

__all__ = [
    "check_device",
    "choose_device",
    "choose_precision",
    "environment",
    "largest_singular_value",
    "rounding_environment",
    "state_bytes",
    "step_times",
    "training_device",
    "weight_norm",
]

WARMING_UP = 3
"""Steps at a run's start whose times are left out: allocators and caches fill."""


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every tensor in the optimizer's state."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(list(optimizer.state.values())))


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


@torch.no_grad()
def weight_norm(model: nn.Module) -> float:
    """Frobenius norm of all weights taken together."""
    return float(torch.stack([parameter.float().norm() for parameter in model.parameters()]).norm())


@torch.no_grad()
def largest_singular_value(model: nn.Module) -> float:
    """The largest singular value of any hidden matrix: embeddings and head are not among them."""
    import spectrim
    from spectrim.optim.layout import matrices

    largest = 0.0
    for group in spectrim.param_groups(model):
        if group["role"] == "matrix":
            for _, parameter in group["params"]:
                for weight in matrices(parameter.detach(), group["layout"], group["split"]):
                    largest = max(largest, float(torch.linalg.matrix_norm(weight.float(), 2).max()))
    return largest


def step_times(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians over a run's steps in milliseconds, and two shares of all its time.

    ``rest_ms`` is all but model and optimizer, ``rest_share`` its share. ``overhead_share`` leaves out the gradient's
    clip, which any loop has: it is what the lab itself costs. Evaluations and checkpoints are not part of a step.
    """
    timed = records[WARMING_UP:] or records
    parts = {
        key: [record.get(key, 0.0) for record in timed]
        for key in ("forward_backward_ms", "optimizer_ms", "gradient_clip_ms", "logging_ms", "rest_ms")
    }
    overhead = list(map(sum, zip(parts["logging_ms"], parts["rest_ms"], strict=True)))
    rest = list(map(sum, zip(parts["gradient_clip_ms"], overhead, strict=True)))
    steps = list(map(sum, zip(*parts.values(), strict=True)))
    return {
        "step_ms": median(steps),
        "forward_backward_ms": median(parts["forward_backward_ms"]),
        "optimizer_ms": median(parts["optimizer_ms"]),
        "rest_ms": median(rest),
        "rest_share": sum(rest) / sum(steps),
        "overhead_share": sum(overhead) / sum(steps),
    }


def rounding_environment(device: torch.device, *, compiled: bool = False) -> dict[str, str | int]:
    """What decides how sums are rounded, so that the same configuration gives the same bits."""
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "compiled": "yes" if compiled else "no",
    }


def environment(device: str) -> dict[str, str | int]:
    """What numbers and times depend on beside the configuration."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 0,
        "device": device,
        "machine": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def choose_device(name: str) -> str:
    """The device that "auto" stands for, or the one that is named."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def check_device(name: str) -> None:
    """Refuse a device that is not here.

    Raises:
        LabError: it names those that are.
    """
    if not name.startswith("cuda"):
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise LabError(f"device {name!r} is not available here, expected one of auto, cpu")
    if (torch.device(name).index or 0) >= count:
        raise LabError(f"device {name!r} is not available here, expected cuda:0 to cuda:{count - 1}, or auto, cpu")


def training_device(name: str) -> torch.device:
    """The device to train on, with its number: a thread that is told "cuda" would take the first one."""
    device = torch.device(choose_device(name))
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def choose_precision(name: Precision, device: str) -> Precision:
    """The precision that "auto" stands for on a device: bfloat16 where its hardware has it, on a GPU."""
    if name != "auto":
        return name
    is_gpu = choose_device(device).startswith("cuda")
    return "bf16" if is_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
