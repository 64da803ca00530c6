"""The page's tables of what benchmarks/cuda.py has measured: one for each section of its file."""

from __future__ import annotations

from collections.abc import Iterator

from gpu.results import FAILED, Row
from gpu.tables import number, table

__all__ = ["measured_sections"]

TITLES = {
    "equality": (
        "Equality",
        "Plain AdamW compared with torch's over 50 steps, and steps with gradients that are not finite.",
    ),
    "steps": (
        "Steps",
        'Medians by CUDA events, launches by the profiler. "waits" has torch\'s error if a step waits for the device; '
        '"products" is the precision of float32 products.',
    ),
    "graph": (
        "In a CUDA graph",
        "GPT-2 small, with the learning rate in a tensor that changes between steps. The difference is the largest "
        "between weights after replays and after eager steps, relative to the largest change.",
    ),
    "share": ("The optimizer's share", "A step of the 34 M model: bfloat16 autocast, compiled, 16,384 tokens."),
    "accuracy": (
        "Accuracy",
        "Relative Frobenius error against float64, and relative excess over the bound. ratio: σ₁/c, or σ₁/σ_min.",
    ),
    "operators": ("Operators", "Milliseconds for one matrix, or for a stack."),
    "scaler": ("Under a GradScaler", "The difference is relative to steps without a GradScaler."),
    "monitor": ("The monitor", "For the 34 M model."),
    "compile": ("Under torch.compile", "Four matrices, `fullgraph=True`, learning rate in a tensor."),
    "kernels": ("Triton kernels", "Steps with and without Triton kernels."),
}


def measured_sections(measured: Row, trained: Row) -> Iterator[str]:
    """Markdown of each section there is."""
    for name, (title, about) in TITLES.items():
        if section := measured.get("sections", {}).get(name):
            yield f"## {title}\n\n{about}\n\n{section_table(section)}"
    if section := trained.get("sections", {}).get("training"):
        where = "Measured on {date}: {device}, torch {torch}, commit {commit}.".format(**trained["provenance"])
        rows = [{key: value for key, value in row.items() if key != "curve"} for row in section["rows"]]
        about = f"The 34 M model, every recipe for the same steps. {where}"
        yield f"## Training\n\n{about}\n\n{section_table({**section, 'rows': rows})}"


def section_table(section: Row) -> str:
    lines = [{key.replace("_", " "): cell(value) for key, value in row.items()} for row in section["rows"]]
    parts = [table(lines)] if lines else []
    if FAILED in section:
        parts.append(f"FAILED: {section[FAILED]}")
    return "\n\n".join(parts)


def cell(value: object) -> str:
    if isinstance(value, list):
        return "x".join(map(str, value))
    return number(value).replace("|", "/").replace("\n", " ")
