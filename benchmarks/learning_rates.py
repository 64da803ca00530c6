"""The search behind the lab's default learning rates: run it, keep its results, write the table of defaults from them.

    python benchmarks/learning_rates.py --workers 2 --threads 1
    python benchmarks/learning_rates.py --write-defaults

Every point is one run at the lab's default size, the same as a run of `spectrim compare`. The points of a recipe lie on
a lattice of factors of two: its search begins at one of them, and goes on until the best is surrounded by worse
ones, so no winner stands at the edge of what was tried. Points whose result is in the results file are not run
again, and an interrupted point goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from spectrim.lab.config import OptimizerConfig, TrainConfig
from spectrim.lab.files import write_json, write_text
from spectrim.lab.logging.run_result import RunResult

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "learning_rates.json"
DEFAULTS = HERE.parent / "src" / "spectrim" / "lab" / "recipes" / "defaults.toml"

# recipe: (learning rate, factor of embeddings and head on it, threshold times learning rate) where its search starts.
# The threshold of a clip follows the factor, so that it means the same to every recipe: how much further embeddings and
# head move in a step.
STARTS: dict[str, tuple[float, float, float | None]] = {
    "adamw": (1.5e-3, 16, None),
    "muon": (4e-3, 8, None),
    "spectra": (2e-3, 8, None),
    "adamw+clip": (8e-3, 8, 0.01),
    "signum+clip": (4e-3, 4, 0.02),
    "ademamix+clip": (8e-3, 4, 0.02),
    "momentum+clip": (3e-2, 4, 0.02),
}
# recipe: the recipe that it adds to. It starts at that one's winner and searches the learning rate alone.
ADDITIONS: dict[str, str] = {
    "adamw+shrink": "adamw",
    "muon+shrink": "muon",
    "adamw+shrink+clip": "adamw+clip",
    "spectra+shrink": "spectra",
}
RATE_STEPS = ((1, 1, 1), (2, 1, 1), (0.5, 1, 1))
FACTOR_STEPS = ((1, 2, 1), (1, 0.5, 1))
BOUND_STEPS = ((1, 1, 2), (1, 1, 0.5))


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of the grid."""

    recipe: str
    lr: float
    multiplier: float
    clip_bound: float | None

    @property
    def name(self) -> str:
        bound = "" if self.clip_bound is None else f"-bound{self.clip_bound:g}"
        return f"{self.recipe}-lr{self.lr:g}-x{self.multiplier:g}{bound}-seed0"

    def config(self, steps: int | None) -> TrainConfig:
        optimizer = OptimizerConfig(
            lr=self.lr, embedding_lr=self.multiplier, head_lr=self.multiplier, clip_bound=self.clip_bound
        )
        config = TrainConfig(recipe=self.recipe, seed=0, optimizer=optimizer)
        return config.model_copy(update={"steps": steps}) if steps else config


def wanted(results: list[dict]) -> Iterator[Point]:
    """Every point that can be named by now and has no result: starts, and neighbours of the best so far."""
    measured = {(entry["recipe"], *place(entry)) for entry in results}
    searching = set()
    for recipe in [*STARTS, *ADDITIONS]:
        plainer = ADDITIONS.get(recipe)
        if plainer in searching:
            searching.add(recipe)
            continue
        lr, multiplier, bound = STARTS[recipe] if plainer is None else place(winner(results, plainer))
        if any(entry["recipe"] == recipe for entry in results):
            lr, multiplier, bound = place(winner(results, recipe))
        steps = RATE_STEPS
        if plainer is None:
            steps += FACTOR_STEPS + (() if bound is None else BOUND_STEPS)
        for rate, factor, scale in steps:
            clip_bound = None if bound is None else bound * scale
            point = Point(recipe=recipe, lr=lr * rate, multiplier=multiplier * factor, clip_bound=clip_bound)
            if (recipe, point.lr, point.multiplier, point.clip_bound) not in measured:
                searching.add(recipe)
                yield point


def winner(results: list[dict], recipe: str) -> dict:
    """The recipe's result with the smallest loss; a diverged run has none and cannot win."""
    finished = [entry for entry in results if entry["recipe"] == recipe and entry["final_loss"] is not None]
    return min(finished, key=lambda entry: entry["final_loss"])


def place(entry: dict) -> tuple[float, float, float | None]:
    return entry["lr"], entry["multiplier"], entry["clip_bound"]


def run_point(point: Point, steps: int | None, folder: Path, cache_dir: Path | None, threads: int) -> RunResult:
    import torch

    from spectrim.lab.training.run import train

    torch.set_num_threads(threads)
    return train(point.config(steps), folder / point.name, resume=True, cache_dir=cache_dir)


def read_results(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []


def run(arguments: argparse.Namespace) -> None:
    """Run what is wanted, as many at once as there are workers; each result is in the file as soon as its run ends."""
    results = read_results(arguments.results)
    running: dict[Future[RunResult], Point] = {}
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        while True:
            for point in wanted(results):
                if arguments.only and point.recipe not in arguments.only:
                    continue
                if len(running) < arguments.workers and point not in running.values():
                    job = (point, arguments.steps, arguments.runs_dir, arguments.cache_dir, arguments.threads)
                    running[pool.submit(run_point, *job)] = point
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                point = running.pop(future)
                results.append(as_entry(point, point.config(arguments.steps), future.result()))
                results.sort(
                    key=lambda entry: (entry["recipe"], entry["clip_bound"] or 0, entry["lr"], entry["multiplier"])
                )
                write_json(arguments.results, {"runs": results})
                print(f"{time.strftime('%H:%M:%S')}  {point.name}  {future.result().final_loss}", flush=True)


def as_entry(point: Point, config: TrainConfig, result: RunResult) -> dict:
    return {
        **asdict(point),
        "seed": config.seed,
        "steps": config.steps,
        "tokens": config.steps * config.tokens_per_step,
        "preset": config.model.preset or "2m",
        "final_loss": result.final_loss,
        "weight_norm": result.weight_norm,
        "threads": result.environment["threads"],
        "torch": result.environment["torch"],
    }


def write_defaults(results: list[dict], path: Path) -> None:
    """Write the winner of each recipe as its default, quoting the result; recipes without results keep their entry."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    for recipe in dict.fromkeys(entry["recipe"] for entry in results):
        best = winner(results, recipe)
        points = sum(entry["recipe"] == recipe for entry in results)
        table[recipe] = {
            "lr": best["lr"],
            "embedding_lr": float(best["multiplier"]),
            "head_lr": float(best["multiplier"]),
            **({} if best["clip_bound"] is None else {"clip_bound": best["clip_bound"]}),
            "source": f"{RESULTS.relative_to(HERE.parent).as_posix()}: loss {best['final_loss']:.4f} after "
            f"{best['steps']} steps, seed {best['seed']}, the best of {points} points",
        }
    lines = ["# Default hyperparameters of every recipe, written by benchmarks/learning_rates.py --write-defaults."]
    for recipe, entry in table.items():
        lines += ["", f'["{recipe}"]', *(f"{key} = {json.dumps(value)}" for key, value in entry.items())]
    write_text(path, "\n".join(lines) + "\n")


def print_table(results: list[dict]) -> None:
    """Losses by recipe, learning rate and multiplier."""
    for recipe in dict.fromkeys(entry["recipe"] for entry in results):
        best = winner(results, recipe)
        print(f"{recipe}: best final loss {best['final_loss']:.4f}")
        for entry in results:
            if entry["recipe"] == recipe:
                loss = "diverged" if entry["final_loss"] is None else f"{entry['final_loss']:.4f}"
                bound = "" if entry["clip_bound"] is None else f"bound {entry['clip_bound']:<6g} "
                print(
                    f"    lr {entry['lr']:<9g} x{entry['multiplier']:<5g} {bound}{loss}{' *' if entry is best else ''}"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each run")
    parser.add_argument("--steps", type=int, help="the lab's default unless given")
    parser.add_argument("--only", nargs="+", metavar="RECIPE", help="only these recipes")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/learning_rates"))
    parser.add_argument("--cache-dir", type=Path)
    parser.add_argument("--list", action="store_true", help="print the results and stop")
    parser.add_argument("--write-defaults", action="store_true", help="write the lab's defaults from the results")
    arguments = parser.parse_args()
    if arguments.write_defaults:
        write_defaults(read_results(arguments.results), DEFAULTS)
    elif not arguments.list:
        run(arguments)
    print_table(read_results(arguments.results))


if __name__ == "__main__":
    sys.exit(main())
