"""Writes docs/gpu.md from the files under benchmarks/results: predictions, what was measured, and the goals."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu.contenders import GOALS, MODELS, MONITOR_LAUNCHES, SHARES
from gpu.page_measured import measured_sections
from gpu.predicted import PREDICTED
from gpu.results import FAILED, FOLDER, MEASURED, TRAINED, Row
from gpu.tables import number, table
from spectrim.lab.files import write_text

__all__ = ["PAGE", "page", "write_page"]

PAGE = Path(__file__).parent.parent.parent / "docs" / "gpu.md"
FIRST = FOLDER / "h100-2026-11-27.json"

TEXT = """\
# Run on a GPU

<!-- Written by benchmarks/gpu_page.py. Edit that. -->

To make steps on a GPU fast:

- Give the learning rate as a tensor and capture the step in a CUDA graph ([kernels.md](kernels.md) shows how). Small
  models gain most, since their eager steps wait for the host.
- Call `spectrim.set_step_memory(1024)` if memory allows ("1 GB" in the tables): fewer buckets need fewer launches.
- Keep the Triton kernels on. They run by default on H100 and H200; elsewhere, try `spectrim.kernels.use(True)`.

To measure your own GPU, in under six minutes:

    python benchmarks/cuda.py
    python benchmarks/cuda.py --train --minutes 10      # trains a model of 34 M parameters by each recipe

{status}

## Compared with torch

Step times as multiples of a torch optimizer's, and launches for GPT-2 small. Weights are float32, except for "bf16",
with `torch.set_float32_matmul_precision("highest")`. Steps take the matrices of all blocks, without embeddings (48
for GPT-2 small). "At most" is the goal, "predicted" is for an H100, "in a graph" is a step captured in a CUDA graph.
Eager steps of small models depend on the host: torch's Muon took 43.6 ms on the machine for which the goals were set.

{goals}

The optimizer's share of a training step, for a model of 34 M parameters (width 512, 8 layers, vocabulary 8,192; 16,384
tokens a step, bfloat16 autocast, compiled). The prediction assumes {forward_backward} ms for forward and backward, as
measured on an H100; a captured step is predicted to take the device's time only.

{shares}

The monitor may add at most {monitor_goal} launches to a step that it does not measure: {monitor}.

## Predictions

These figures are counted without a GPU. `benchmarks/launches.py` runs a step on fake CUDA tensors, which have shapes
but no storage, and counts all operators that torch dispatches:

- launches; "waits" of the host for the device; "uploads", copies from pageable host memory. A step with waits or
  uploads cannot be captured in a CUDA graph.
- "GB" read and written; "TFLOP" of products; "extra MB" of memory in addition to weights, gradients and state.
- Times in ms, predicted from the counts: "busy" is the device's time, "host" the host's time to launch, "ms" the
  whole step.

{calibration} Counted on {counted_date} with torch {counted_torch} at commit {counted_commit}.

{predicted}

Launches, waits, uploads, memory and busy times are reliable. Host times may differ by factors of 0.5 to 1.4 between
hosts, so compare rows of one table. Not counted are kernels that split a product along its inner dimension, memory
inside operators, and rounding by the caching allocator.

    python benchmarks/launches.py --model llama-1b --only "adamw+clip" --why      # with the lines that launch
    python benchmarks/gpu_page.py                                                 # count all, and write this page
{measured}
## Earlier measurements on an H100

On {first_date}, {first_device}, torch {first_torch}, commit {first_commit}, before steps worked on lists and stacks.
Medians; "predicted" is the result of `benchmarks/launches.py` for that commit.

{first_steps}

Every step of spectrim waited for the device. Times for one matrix with float32 products in full precision (and in
TF32):

{first_operators}

Relative errors against float64, by σ₁/c and the precision of float32 products, of `soft_clip` and of ten coupled
Newton-Schulz steps in bfloat16:

{first_accuracy}

{first_training}
"""

MISSING = "**This version has not been measured on a GPU.** All figures are counted and predicted."
FOUND = """\
Measured on {date} with `python benchmarks/cuda.py`: {device}, torch {torch}, commit {commit}. Predictions are for
commit {predicted_commit}."""


def write_page() -> None:
    """Write the page."""
    write_text(PAGE, page())


def page() -> str:
    """The page, from what the files hold."""
    predicted, first = read(PREDICTED), read(FIRST)
    measured, trained = read(MEASURED), read(TRAINED)
    about = first["provenance"]
    monitor = predicted["monitor"]
    return TEXT.format(
        status=status(predicted, measured),
        goals=goals(predicted["rows"], steps_of(measured), replays_of(measured)),
        monitor_goal=MONITOR_LAUNCHES,
        shares=shares(predicted["model"], first["training"]["forward_backward_ms"], measured),
        forward_backward=first["training"]["forward_backward_ms"],
        monitor=monitor.get(FAILED) or f"{monitor['launches']} are counted, and it waits {times_of(monitor['waits'])}",
        calibration=calibration(first["optimizers"]),
        predicted="\n\n".join(prediction(model, predicted["rows"]) for model in MODELS),
        measured="".join(f"\n{part}\n" for part in measured_sections(measured, trained)),
        first_steps=first_steps(first["optimizers"]),
        first_operators=first_operators(first["operators"]),
        first_accuracy=first_accuracy(first),
        first_training=first_training(first["training"]),
        **{f"counted_{key}": predicted["provenance"][key] for key in ("date", "torch", "commit")},
        **{f"first_{key}": about[key] for key in ("date", "device", "torch", "commit")},
    )


def read(path: Path) -> Row:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def status(predicted: Row, measured: Row) -> str:
    if not measured:
        return MISSING
    found = FOUND.format(**measured["provenance"], predicted_commit=predicted["provenance"]["commit"])
    note = measured["provenance"].get("note")
    return f"{found}\n\n{note}" if note else found


def times_of(count: int) -> str:
    return {0: "never", 1: "once"}.get(count, f"{count} times")


# -- Goals ------------------------------------------------------------------------------------------------------------


def steps_of(measured: Row) -> list[Row]:
    found = measured.get("sections", {}).get("steps", {}).get("rows", [])
    return [row for row in found if row["products"] == "highest"]


def goals(predicted: Sequence[Row], measured: Sequence[Row], replays: Mapping[str, float]) -> str:
    """A row for every goal; what is measured stands beside what is predicted, where there is any.

    Args:
        replays: milliseconds of steps captured in a CUDA graph, on the matrices of GPT-2 small.
    """
    lines = []
    for name, kinds in GOALS.items():
        for goal in kinds:
            line = {"step of": name, "over that of": goal.peer}
            for model, most in (("gpt2-small", goal.gpt2_small), ("llama-1b", goal.llama_1b)):
                line[f"{model}: at most"] = number(most)
                told = rows_of(predicted, model)
                line[f"{model}: predicted"] = ratio(told, name, goal.peer)
                by_kernels = {**told, name: rows_of(predicted, model, kernels=True).get(name, {})}
                if "ms" in by_kernels[name]:
                    line[f"{model}: with Triton kernels"] = ratio(by_kernels, name, goal.peer)
                if measured:
                    own = rows_of(measured, model)
                    line[f"{model}: measured"] = ratio(own, name, goal.peer)
                    if model == "gpt2-small" and name in replays:
                        line["in a graph"] = ratio({**own, name: {"ms": replays[name]}}, name, goal.peer)
            line["launches: at most"] = str(goal.launches)
            line["counted"] = value_of(rows_of(predicted, "gpt2-small"), name, "launches")
            if measured:
                line["profiled"] = value_of(rows_of(measured, "gpt2-small"), name, "kernels")
            lines.append(line)
    return table(lines)


def replays_of(measured: Row) -> dict[str, float]:
    """The time of a replay by name."""
    found = measured.get("sections", {}).get("graph", {}).get("rows", [])
    return {row["name"]: row["replay_ms"] for row in found if "replay_ms" in row}


def rows_of(found: Iterable[Row], model: str, *, kernels: bool = False) -> dict[str, Row]:
    """Rows of a model by name: those with torch's own operations, or those with Triton kernels."""
    return {row["name"]: row for row in found if row["model"] == model and (row.get("kernels") is True) == kernels}


def ratio(found: Mapping[str, Row], name: str, peer: str) -> str:
    if "ms" not in found.get(name, {}) or "ms" not in found.get(peer, {}):
        return "-"
    return number(found[name]["ms"] / found[peer]["ms"])


def value_of(found: Mapping[str, Row], name: str, key: str) -> str:
    return number(found.get(name, {}).get(key))


def shares(predicted: Sequence[Row], rest: float, measured: Row) -> str:
    """The optimizer's share of a step of the 34 M model."""
    found = {row["name"]: row for row in measured.get("sections", {}).get("share", {}).get("rows", [])}
    lines = []
    for row in predicted:
        line = {"": row["name"], "captured: at most": "-"}
        if row["name"] in SHARES:
            line["captured: at most"] = f"{SHARES[row['name']]:.0%}"
        for kind, key in (("captured", "busy_ms"), ("eager", "ms")):
            line[f"{kind}: predicted"] = f"{row[key] / (row[key] + rest):.0%}" if key in row else row[FAILED]
            if share := found.get(row["name"], {}).get(f"{kind}_share"):
                line[f"{kind}: measured"] = f"{share:.0%}"
        lines.append(line)
    return table(lines)


# -- Predictions ------------------------------------------------------------------------------------------------------


def calibration(found: Sequence[Row]) -> str:
    off = [row["predicted"]["ms"] / row["ms"] for row in found]
    median = statistics.median(abs(x - 1) for x in off)
    return (
        f"The model of the machine (`benchmarks/gpu/h100.py`) is fitted to {len(off)} steps that were measured on an "
        f"H100,\nshown below. Predictions differ from measurements by {median:.0%} in the median, and by factors of "
        f"{min(off):.2f} to {max(off):.2f}."
    )


def prediction(model: str, found: Sequence[Row]) -> str:
    counted, failed = [], []
    for row in found:
        if row["model"] != model:
            continue
        name = row["name"] + ", Triton kernels" * row["kernels"]
        if FAILED in row:
            failed.append(f"- {name}: {row[FAILED]}")
            continue
        work = " ".join(f"{kind} {number(flops)}" for kind, flops in row["teraflop"].items())
        keys = ("launches", "waits", "uploads")
        line = {"": name, **{key: number(row[key]) for key in keys}, "extra MB": number(row["extra_mb"])}
        line |= {"GB": number(row["gigabytes"]), "TFLOP": work or "-"}
        counted.append(line | {key.removesuffix("_ms"): number(row[key]) for key in ("host_ms", "busy_ms", "ms")})
    parts = [f"{model}, {len(MODELS[model])} matrices:", table(counted)]
    if failed:
        parts.append("Not counted:\n\n" + "\n".join(failed))
    return "\n\n".join(parts)


# -- The first measurements -------------------------------------------------------------------------------------------


def first_steps(found: Sequence[Row]) -> str:
    lines = {row["name"]: {"": row["name"]} for row in found}
    for row in found:
        if row["precision"] == "highest":
            model, told = row["model"], row["predicted"]
            lines[row["name"]] |= {
                f"{model}: ms": number(row["ms"]),
                f"{model}: predicted": number(told["ms"]),
                f"{model}: kernels": str(row["kernels"]),
                f"{model}: extra MB": str(row["extra_mb"]),
            }
    return table(lines.values())


def first_operators(found: Sequence[Row]) -> str:
    by_shape: dict[str, dict[str, Any]] = {}
    for row in found:
        by_shape.setdefault("x".join(map(str, row["shape"])), {})[row["precision"]] = row["ms"]
    labels = list(found[0]["ms"])
    return table(
        {"ms": shape, **{x: f"{number(ms['highest'][x])} ({number(ms['high'][x])})" for x in labels}}
        for shape, ms in by_shape.items()
    )


def first_accuracy(first: Row) -> str:
    forms = {"error": "soft_clip", "error_ten_bfloat16_steps": "ten steps"}
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in first["accuracy"]["soft_clip"]:
        for key, form in forms.items():
            about = {"": form, "shape": "x".join(map(str, row["shape"])), "products": row["precision"]}
            lines.setdefault(tuple(about.values()), about)[number(row["ratio"])] = f"{row[key]:.0e}"
    return table(lines[key] for key in sorted(lines))


def first_training(found: Row) -> str:
    lines = [
        {
            "recipe": run["recipe"],
            "lr": number(run["lr"]),
            "factor of embedding and head": number(run["factor"]),
            "validation loss": f"{run['validation_loss']:.4f}",
            "optimizer ms": number(run["optimizer_ms"]),
        }
        for run in found["runs"]
    ]
    about = f"{found['model']}. Forward and backward took about {found['forward_backward_ms']} ms."
    return f"Training, {about}\n\n{table(lines)}"
