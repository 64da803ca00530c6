"""Counts what a step of every optimizer would cost on an H100, on a machine that has no GPU.

    python benchmarks/launches.py                                    # GPT-2 small; or --model llama-1b
    python benchmarks/launches.py --only "spectra,torch.Muon" --why  # and the lines that launch
    python benchmarks/launches.py --precision high                   # float32 products as TF32
    python benchmarks/launches.py --kernels                          # with Triton kernels
    python benchmarks/launches.py --monitor                          # what a monitor adds to a step it does not measure

Columns: kernels; waits (synchronisations) and uploads (copies from pageable host memory), both of which must be 0 for
CUDA graphs; GB read and written; TFLOP of products by kind; MB that the step needs beyond weights, gradients and state;
ms of the host; ms in which the device is busy, the floor that no saving of launches passes; ms of the step. Seconds are
predicted by a model of one H100 (gpu/h100.py): trust counts, memory and busy ms; read host ms as 0.5 to 1.4 of the
figure; compare optimizers within one table. ``measure`` does it for any ``params -> optimizer``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import torch
from torch.optim import Optimizer

from gpu.contenders import CONTENDERS, MODELS, Params, Shapes
from gpu.counting import Cost, measure, measure_monitor
from gpu.predicted import with_kernels

__all__ = ["CONTENDERS", "MODELS", "Cost", "measure", "report"]

HEADER = f"{'':20} kernels  waits uploads      GB              TFLOP extra MB  host ms  busy ms  time ms"


def report(factories: Mapping[str, Callable[[Params], Optimizer]], shapes: Shapes, why: bool = False) -> None:
    """Print one row for each factory; one that cannot be made, or whose step fails, says why."""
    print(HEADER)
    for name, make in factories.items():
        dtype = getattr(make, "weights", torch.float32)
        try:
            cost = measure(make, shapes, dtype, why)
        except Exception as error:
            print(f"{name:20} cannot be counted: {type(error).__name__}: {str(error).strip().splitlines()[0][:150]}")
            continue
        print(row(name, cost))
        for (line, operator), count in cost.where.most_common(15):
            print(f"    {count:6} {line} {operator}")


def row(name: str, cost: Cost) -> str:
    work = " ".join(f"{kind} {flops / 1e12:.2f}" for kind, flops in cost.flops.items()) or "-"
    clocks = " ".join(f"{seconds * 1e3:8.2f}" for seconds in (cost.host, cost.busy, cost.seconds))
    counts = f"{cost.kernels:7} {cost.waits:6} {cost.uploads:7} {cost.bytes / 1e9:7.2f}"
    return f"{name:20} {counts} {work:>18} {cost.extra / 2**20:8.0f} {clocks}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="gpt2-small")
    parser.add_argument("--precision", choices=("highest", "high"), default="highest", help="of float32 products")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="names, separated by commas")
    parser.add_argument("--why", action="store_true", help="also the lines that launch most, 15 for each")
    parser.add_argument("--kernels", action="store_true", help="with Triton kernels")
    parser.add_argument("--monitor", action="store_true", help="what a monitor adds to a step it does not measure")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := [name for name in names if name not in CONTENDERS]:
        parser.error(f"unknown optimizer {unknown[0]!r}: expected some of {', '.join(CONTENDERS)}")
    torch.set_float32_matmul_precision(arguments.precision)
    if arguments.monitor:
        cost = measure_monitor(CONTENDERS["adamw"], MODELS[arguments.model])
        print(f"monitor: {cost.kernels} launches, {cost.waits} waits, {cost.uploads} uploads more at most")
        return
    with with_kernels(arguments.kernels):
        report({name: CONTENDERS[name] for name in names}, MODELS[arguments.model], arguments.why)


if __name__ == "__main__":
    main()
