"""The command line of benchmarks/cuda.py."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from gpu import measure_model, measure_modes, measure_operators, measure_optimizers
from gpu.device import Device
from gpu.model import Sizes
from gpu.page import PAGE, write_page
from gpu.recipes import RECIPES
from gpu.results import MEASURED, TRAINED, Results, provenance
from gpu.training import Text, read_tokens, training

__all__ = ["main"]

# Kernels come last: one that goes astray takes the whole process's device with it.
SECTIONS = {
    "equality": measure_modes.equality,
    "steps": measure_optimizers.steps,
    "graph": measure_modes.capturing,
    "share": measure_model.shares,
    "accuracy": measure_operators.accuracy,
    "operators": measure_operators.times,
    "scaler": measure_modes.scaling,
    "monitor": measure_model.monitoring,
    "compile": measure_modes.compiling,
    "kernels": measure_modes.kernels,
}
REHEARSAL = Path(__file__).parent.parent.parent / "runs" / "rehearsal"


def main(about: str) -> None:
    """Run the command; ``about`` is its help."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="the smallest problems, to rehearse")
    parser.add_argument("--only", default="", help=f"sections of {', '.join(SECTIONS)}, or with --train recipes")
    parser.add_argument("--seconds", type=float, default=320.0, help="after which no measurement starts")
    parser.add_argument("--out", type=Path, help="the JSON file")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, all recipes together")
    parser.add_argument("--tokens", type=Path, help="a file of 16-bit tokens below 8,192")
    parser.add_argument("--data", action="append", default=[], help="text to tokenize, as for spectrim train")
    parser.add_argument("--capture", action="store_true", help="train with steps captured in a CUDA graph")
    arguments = parser.parse_args()
    known = RECIPES if arguments.train else SECTIONS
    chosen = arguments.only.split(",") if arguments.only else list(known)
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"unknown {unknown[0]!r}: expected some of {', '.join(known)}")
    if arguments.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device}: there is no CUDA device; rehearse with --device cpu --small")
    device = Device(arguments.device, small=arguments.small, seconds=1e9 if arguments.train else arguments.seconds)
    real = device.cuda and not device.small
    kept = TRAINED if arguments.train else MEASURED
    results = Results(arguments.out or (kept if real else REHEARSAL / kept.name), provenance(device))
    print(*(f"{key}: {value}" for key, value in results.content["provenance"].items()), sep="\n")
    if arguments.train:
        sizes = Sizes.of(device)
        text = Text(read_tokens(arguments.tokens, arguments.data, sizes, small=device.small), sizes, device)
        section = training(text, arguments.minutes, chosen, capture=arguments.capture)
        done = [results.section("training", device, section)]
    else:
        done = [results.section(name, device, SECTIONS[name]) for name in chosen]
    print(f"results in {results.path}")
    if real and arguments.out is None:
        write_page()
        print(f"page in {PAGE}")
    sys.exit(0 if all(done) else 1)
