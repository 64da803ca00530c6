"""Settings of ``spectrim bench``, and the shapes that it measures. Imports no torch, so that ``--help`` is quick."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from spectrim.lab.errors import LabError
from spectrim.lab.settings import Config, PositiveFloat, PositiveInt, unset

__all__ = [
    "BLOCKS",
    "SHAPE_SETS",
    "DtypeName",
    "OperatorBench",
    "OptimizerBench",
    "SolverName",
    "SpectrumName",
    "TrainingBench",
    "parse_shapes",
]

SHAPE_SETS: dict[str, tuple[tuple[int, ...], ...]] = {
    "small": ((768, 768), (768, 3072), (1024, 4096), (2048, 2048)),
    "gpt2-small": ((768, 768), (2304, 768), (3072, 768), (768, 3072)),
    "llama-1b": ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)),
    "llama-8b": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "moe": ((64, 1024, 2048), (64, 2048, 1024)),
}
"""Matrices, or stacks of them, for the benchmark of operators."""

BLOCKS: dict[str, tuple[tuple[int, ...], ...]] = {
    "gpt2-small": ((2304, 768), (768, 768), (3072, 768), (768, 3072)),
    "llama-1b": ((2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192)),
    "tiny": ((96, 64), (64, 96)),
}
"""The matrices of one transformer block, outputs x inputs, for the benchmark of optimizers."""

SpectrumName = Literal["adam", "flat", "geometric", "one-spike", "ten-spikes", "rank-deficient", "sign"]
SolverName = Literal["auto", "rational", "minimax", "reference", "newton_schulz"]
DtypeName = Literal["float32", "bfloat16", "float16", "float64"]


def parse_shapes(text: str) -> list[tuple[int, ...]]:
    """The shapes of a set by name, or of a list such as 768x3072,8x512x512."""
    if text in SHAPE_SETS:
        return list(SHAPE_SETS[text])
    shapes = []
    for part in text.split(","):
        sizes = part.strip().split("x")
        if not 2 <= len(sizes) <= 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise LabError(f"shapes {part!r}: expected {', '.join(SHAPE_SETS)}, or sizes such as 768x3072 or 8x512x512")
        shapes.append(tuple(map(int, sizes)))
    return shapes


def check_picture(path: Path) -> Path:
    """Check that the suffix is a picture's."""
    if path.suffix not in (".svg", ".png"):
        raise ValueError("expected a name that ends in .svg or .png")
    return path


class Machine(Config):
    """The hardware of a benchmark of operators or optimizers."""

    device: str = "cpu"
    """cpu, cuda, or another device of torch."""
    threads: PositiveInt | None = unset("as many as torch takes")
    """CPU threads."""
    json_path: Path | None = unset("none")
    """Write the measurements to this file."""


class OperatorBench(Machine):
    """Settings of the benchmark of operators."""

    shapes: str = Field(default="small", description=f"{', '.join(SHAPE_SETS)}, or a list such as 768x3072,8x512x512.")
    solvers: tuple[SolverName, ...] = ("auto", "newton_schulz")
    """How the clip is computed."""
    dtypes: tuple[DtypeName, ...] = ("float32",)
    """Number formats of the input."""
    spectra: tuple[SpectrumName, ...] = ("adam",)
    """Singular values of the input."""
    ratio: PositiveFloat = 100.0
    """Largest singular value over the threshold."""
    repeats: PositiveInt = 5
    """Timed rounds; the median counts."""
    plot: Annotated[Path, AfterValidator(check_picture)] | None = unset("none")
    """Draw error against κ to this .svg or .png."""


class OptimizerBench(Machine):
    """Settings of the benchmark of optimizers."""

    block: str = Field(default="gpt2-small", description=f"Shapes of a transformer block: {', '.join(BLOCKS)}.")
    blocks: PositiveInt = 2
    """How many such blocks are stepped."""
    contender: str = "all"
    """Recipes and optimizers to measure, separated by commas; an unknown name is answered with the known ones."""
    compiled: bool = False
    """Measure spectrim's steps under torch.compile."""
    repeats: PositiveInt = 15
    """Timed rounds; the median counts."""


class TrainingBench(Config):
    """Settings of the benchmark of the training loop."""

    preset: str = "10m"
    """Model size, as for `spectrim train`."""
    recipe: str = "adamw"
    """The lab's optimizer; the bare loop has torch's AdamW."""
    steps: Annotated[int, Field(ge=4)] = 20
    """Steps of either loop."""
    batch_size: PositiveInt = 16
    """Sequences in a batch."""
    sequence_length: Annotated[int, Field(ge=2)] = 128
    """Tokens in a sequence."""
    sources: tuple[str, ...] = Field(default=(), json_schema_extra={"default": "State of the Union addresses"})
    """Text to train on."""
    compiled: bool = False
    """Compile the model in both loops."""
    json_path: Path | None = unset("none")
    """Write the measurements to this file."""
