"""Predictions for every contender on both models, in a file that the page quotes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from functools import partial
from typing import Any

import torch

from gpu.contenders import CONTENDERS, GOALS, MODELS
from gpu.counting import Cost, measure, measure_model, measure_monitor
from gpu.device import first_line
from gpu.model import Language, Sizes
from gpu.recipes import RECIPES
from gpu.results import FAILED, FOLDER, Row, commit
from spectrim.lab.files import write_json

__all__ = ["PREDICTED", "predict", "with_kernels"]

PREDICTED = FOLDER / "gpu-predicted.json"


def predict() -> Row:
    """Count everything, and write the file."""
    about = {"date": date.today().isoformat(), "torch": torch.__version__, "commit": commit()}
    content = {"provenance": about, "rows": list(counted()), "model": list(whole_model()), "monitor": monitor()}
    write_json(PREDICTED, content)
    return content


def counted() -> Iterator[Row]:
    for model in MODELS:
        for name in CONTENDERS:
            yield {"model": model, "name": name, "kernels": False, **attempt(model, name, kernels=False)}
        for name in GOALS:
            yield {"model": model, "name": name, "kernels": True, **attempt(model, name, kernels=True)}


def whole_model() -> Iterator[Row]:
    """The 34 M model's optimizers, embeddings and vectors among their parameters."""
    for name, recipe in RECIPES.items():
        build = partial(recipe.build, steps=700, warmup=70, device=torch.device("cuda", 0), in_tensor=False)
        try:
            row = row_of(measure_model(lambda: Language(Sizes()), build))
        except Exception as error:
            row = {FAILED: first_line(error)}
        yield {"name": name, **row}


def attempt(model: str, name: str, *, kernels: bool) -> Row:
    contender = CONTENDERS[name]
    try:
        with with_kernels(kernels):
            return row_of(measure(contender, MODELS[model], contender.weights))
    except Exception as error:
        return {FAILED: first_line(error)}


def with_kernels(switch: bool) -> AbstractContextManager[Any]:
    """Triton kernels on or off for a while."""
    try:
        from spectrim.kernels import use
    except ImportError:
        if switch:
            raise RuntimeError("this version of spectrim has no Triton kernels") from None
        return nullcontext()
    switched: AbstractContextManager[Any] = use(switch)
    return switched


def row_of(cost: Cost) -> Row:
    return {
        "launches": cost.kernels,
        "waits": cost.waits,
        "uploads": cost.uploads,
        "extra_mb": round(cost.extra / 2**20, 2),
        "gigabytes": round(cost.bytes / 1e9, 2),
        "teraflop": {kind: round(flops / 1e12, 3) for kind, flops in cost.flops.items()},
        "host_ms": round(cost.host * 1e3, 2),
        "busy_ms": round(cost.busy * 1e3, 2),
        "ms": round(cost.seconds * 1e3, 2),
    }


def monitor() -> Row:
    try:
        cost = measure_monitor(CONTENDERS["adamw"], MODELS["gpt2-small"])
    except Exception as error:
        return {FAILED: first_line(error)}
    return {"launches": cost.kernels, "waits": cost.waits, "uploads": cost.uploads, "host_ms": cost.host * 1e3}
