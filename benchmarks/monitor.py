"""Measures what SpectralMonitor costs and how near its estimates are, and writes both into docs/monitor.md.

    python benchmarks/monitor.py 2m
    python benchmarks/monitor.py 10m --steps 8

What was measured is kept in benchmarks/results/monitor.json, and the page rewritten between its two markers only.
Models are the lab's, the text is random tokens, a step is that of `spectrim train`: 16 sequences of 128 tokens,
forward, backward, global clip, optimizer.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

import torch
from torch import nn

import spectrim
from spectrim.lab.files import write_json, write_text
from spectrim.lab.models.architecture import PRESETS
from spectrim.lab.models.build import build_model
from spectrim.lab.training.device import environment
from spectrim.monitor import Alarm, Record

RESULTS = Path(__file__).parent / "results" / "monitor.json"
PAGE = Path(__file__).parent.parent / "docs" / "monitor.md"
BEGIN, END = "<!-- figures: benchmarks/monitor.py -->", "<!-- end of figures -->"
VOCABULARY, ROWS, LENGTH = 4096, 16, 128
EVERY, WARMING_UP = 4, 2
SPREAD = 0.1
RECIPES = {
    "torch's fused AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-3, fused=True),
    "`AdamW(clip=10)`": lambda groups: spectrim.AdamW(groups, lr=1e-3, clip=10.0, clip_scope="all"),
}
ESTIMATES = (
    "gradient_spectral_norm",
    "gradient_spike_share",
    "gradient_tail_index",
    "update_spectral_norm",
    "update_spike_share",
    "weight_spectral_norm",
    "above_threshold",
)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, index: int) -> None:
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(index))
    logits = model(input_ids=tokens[:, :-1]).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def cost(preset: str, recipe: str, steps: int) -> dict[str, Any]:
    """A row of the table, and how far estimates were from exact numbers after the last step."""
    model = build_model(preset, vocabulary_size=VOCABULARY, sequence_length=LENGTH, seed=0)
    optimizer = RECIPES[recipe](spectrim.param_groups(model))
    monitor = spectrim.SpectralMonitor(model, optimizer, EVERY, out=None)
    bare, measured, others = [], [], []
    for index in range(1, steps + 1):
        began, before = perf_counter(), monitor.milliseconds
        step(model, optimizer, index)
        took = monitor.milliseconds - before
        if index > WARMING_UP:
            bare.append(1000 * (perf_counter() - began) - took)
            (measured if index % EVERY == 0 else others).append(took)
    monitor.close()
    cheap = spectrim.SpectralMonitor(model, optimizer, 1, out=None, alarm=None)
    exact = spectrim.SpectralMonitor(model, optimizer, 1, out=None, alarm=None, exact_every=1)
    step(model, optimizer, 0)
    cheap.close()
    exact.close()
    whole = median(bare)
    return {
        "model": preset,
        "optimizer": recipe,
        "matrices": len(monitor.names),
        "step ms": round(whole),
        "measurement ms": round(median(measured)),
        "exact measurement ms": round(exact.milliseconds),
        "other steps ms": round(fmean(others), 2),
        "share at every=100": f"{(median(measured) + 99 * fmean(others)) / (100 * whole):.2%}",
        "differences": differences(cheap.last, exact.last),
    }


def differences(cheap: Record, exact: Record) -> dict[str, float]:
    """The largest difference of every estimate over all matrices: relative, but that of shares of values as it is."""
    found: dict[str, float] = {}
    for name, entry in exact["parameters"].items():
        for quantity in ESTIMATES:
            if quantity in entry:
                scale = 1.0 if quantity == "above_threshold" else entry[quantity]
                difference = abs(cheap["parameters"][name][quantity] - entry[quantity]) / scale
                found[quantity] = max(found.get(quantity, 0.0), difference)
    return found


def false_warnings(spread: float) -> dict[str, int]:
    """Warnings of 100,000 values whose logarithms are noise of this standard deviation, by its kind."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(7, 100_000, generator=generator, dtype=torch.float64)
    noise = {
        "normal": normal[0],
        # The difference of two exponentials, each the sum of two squares.
        "Laplace": (normal[1].square() + normal[2].square() - normal[3].square() - normal[4].square()) / math.sqrt(8),
        "Student with 5 degrees": normal[0] / normal[2:].square().mean(0).sqrt() * math.sqrt(3 / 5),
    }
    found = {}
    for name, values in noise.items():
        alarm = Alarm()
        series = (spread * values).exp().tolist()
        found[name] = sum(len(alarm(i, {"w": {"update_rms": v, "lr": 1.0}})) for i, v in enumerate(series))
    return found


def figures(rows: list[dict[str, Any]], machine: dict[str, Any]) -> list[str]:
    names = [name for name in rows[0] if name != "differences"]
    table = [names, ["---", "---", *["---:"] * (len(names) - 2)], *([str(row[name]) for name in names] for row in rows)]
    largest = {name: max(row["differences"].get(name, 0.0) for row in rows) for name in ESTIMATES}
    return [
        f"Steps of {ROWS} x {LENGTH} tokens, medians; torch {machine['torch']}, {machine['threads']} threads, "
        f"{machine['machine']}:",
        "",
        *(f"| {' | '.join(cells)} |" for cells in table),
        "",
        "The largest error of estimates, over all matrices of these models: relative errors, except for",
        "`above_threshold`:",
        "",
        "| " + " | ".join(f"`{name}`" for name in largest) + " |",
        "|" + " ---: |" * len(largest),
        "| " + " | ".join(f"{value:.1g}" for value in largest.values()) + " |",
        "",
        f"False warnings in 100,000 values whose logarithms are noise of standard deviation {SPREAD}: "
        + ", ".join(f"{count} if it is {name}" for name, count in false_warnings(SPREAD).items())
        + ".",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--steps", type=int, default=14)
    arguments = parser.parse_args()
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"rows": {}}
    kept["machine"] = environment("cpu")
    kept["rows"][arguments.preset] = [cost(arguments.preset, recipe, arguments.steps) for recipe in RECIPES]
    write_json(RESULTS, kept)
    rows = [row for preset in sorted(kept["rows"], key=list(PRESETS).index) for row in kept["rows"][preset]]
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    write_text(PAGE, "\n".join([before + BEGIN, *figures(rows, kept["machine"]), END]) + rest.split(END)[1])


if __name__ == "__main__":
    main()
