"""What a finished run is measured by, beside its losses: state, weights, medians of its times, and where it ran."""

import os
import platform

import torch

from spectrim.lab.config import Precision
from spectrim.lab.errors import LabError

__all__ = [
    "check_device",
    "choose_device",
    "choose_precision",
    "environment",
    "rounding_environment",
    "training_device",
]


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
