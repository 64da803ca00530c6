"""Chooses devices and precisions by name, and describes the machine and code behind a result."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch

import spectrim
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
    """The settings that decide rounding; if they are equal, the same configuration gives the same bits."""
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "compiled": "yes" if compiled else "no",
    }


def environment(device: str) -> dict[str, str | int]:
    """The code, date and machine of a result, for ``result.json``."""
    return {
        "spectrim": spectrim.__version__,
        **({"commit": commit} if (commit := commit_of_the_code()) else {}),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 0,
        "device": device,
        "machine": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


@cache
def commit_of_the_code() -> str:
    """The git commit of spectrim, with "-dirty" if files differ from it; empty for an installed package."""
    root = Path(spectrim.__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def choose_device(name: str) -> str:
    """The device that "auto" stands for, or the one that is named."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def check_device(name: str) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        LabError: the message names the available devices.
    """
    if not name.startswith("cuda"):
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise LabError(f"device {name!r} is not available here, expected one of auto, cpu")
    if (torch.device(name).index or 0) >= count:
        raise LabError(f"device {name!r} is not available here, expected cuda:0 to cuda:{count - 1}, or auto, cpu")


def training_device(name: str) -> torch.device:
    """The device to train on, with its number, since "cuda" alone means the first one in a new thread."""
    device = torch.device(choose_device(name))
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def choose_precision(name: Precision, device: str) -> Precision:
    """The precision that "auto" stands for on a device: bfloat16 on a GPU whose hardware supports it."""
    if name != "auto":
        return name
    is_gpu = choose_device(device).startswith("cuda")
    return "bf16" if is_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
