"""The grid behind the lab's default learning rates: run it, keep its results, write the table of defaults from them.

    python benchmarks/learning_rates.py --workers 2 --threads 1
    python benchmarks/learning_rates.py --write-defaults

Every point is one run at the lab's default size, the same as a run of `spectrim compare`. Points whose result is in
the results file are not run again, and an interrupted point goes on from its checkpoint. Second-stage recipes are
searched around the winner of the recipe that they add to, so their points appear when the first stage is done.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from spectrim.lab.config import OptimizerConfig, TrainConfig
from spectrim.lab.files import write_json, write_text
from spectrim.lab.results import RunResult

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "learning_rates.json"
DEFAULTS = HERE.parent / "src" / "spectrim" / "lab" / "defaults.toml"

# recipe: (learning rates, factors of embeddings and head on them). Recipes whose embeddings and head are left to
# AdamW search that factor too; the scale of the clipped ones gives them theirs (methods: s = sqrt(max(1, m/n))).
FIRST_STAGE: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "adamw": ((1.5e-3, 3e-3, 6e-3), (1, 4, 8)),
    "adamw+clip": ((2e-3, 3e-3, 5e-3, 8e-3), (1,)),
    "muon": ((2e-3, 4e-3, 8e-3), (1, 4, 8)),
    "spectra": ((1e-3, 2e-3, 4e-3), (1, 4, 8)),
}

# recipe: (the recipe it adds to, factors on that one's best learning rate); the multiplier is that one's.
SECOND_STAGE: dict[str, tuple[str, tuple[float, ...]]] = {
    "adamw+shrink": ("adamw", (0.7, 1, 1.5)),
    "muon+shrink": ("muon", (0.7, 1, 1.5)),
    "spectra+shrink": ("spectra", (0.7, 1, 1.5)),
    "adamw+shrink+clip": ("adamw+clip", (0.7, 1, 1.5)),
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of the grid."""

    recipe: str
    lr: float
    multiplier: float
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.recipe}-lr{self.lr:g}-x{self.multiplier:g}-seed{self.seed}"

    def config(self, steps: int | None) -> TrainConfig:
        optimizer = OptimizerConfig(lr=self.lr, embedding_lr=self.multiplier, head_lr=self.multiplier)
        config = TrainConfig(recipe=self.recipe, seed=self.seed, optimizer=optimizer)
        return config.model_copy(update={"steps": steps}) if steps else config


def grid(results: list[dict], seeds: list[int]) -> Iterator[Point]:
    """Every point that can be named by now: the second stage needs the first one's winners."""
    for recipe, (rates, multipliers) in FIRST_STAGE.items():
        for lr in rates:
            for multiplier in multipliers:
                yield from (Point(recipe=recipe, lr=lr, multiplier=multiplier, seed=seed) for seed in seeds)
    for recipe, (plainer, factors) in SECOND_STAGE.items():
        rates, multipliers = FIRST_STAGE[plainer]
        measured = [entry for entry in results if entry["recipe"] == plainer]
        if len(measured) < len(rates) * len(multipliers) * len(seeds):
            continue
        best = winner(measured)
        for factor in factors:
            lr = float(f"{best['lr'] * factor:.2g}")
            yield from (Point(recipe=recipe, lr=lr, multiplier=best["multiplier"], seed=seed) for seed in seeds)


def winner(entries: list[dict]) -> dict:
    """The (lr, multiplier) with the smallest mean loss over its seeds; a diverged run has none and cannot win."""
    means = {}
    for key in {(entry["lr"], entry["multiplier"]) for entry in entries}:
        losses = [entry["final_loss"] for entry in entries if (entry["lr"], entry["multiplier"]) == key]
        if None not in losses:
            means[key] = (sum(losses) / len(losses), len(losses))
    lr, multiplier = min(means, key=lambda key: means[key])
    loss, seeds = means[lr, multiplier]
    return {"lr": lr, "multiplier": multiplier, "final_loss": loss, "seeds": seeds}


def run_point(point: Point, steps: int | None, folder: Path, cache_dir: Path | None, threads: int) -> RunResult:
    import torch

    from spectrim.lab.train import train

    torch.set_num_threads(threads)
    return train(point.config(steps), folder / point.name, resume=True, cache_dir=cache_dir)


def read_results(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []


def run(arguments: argparse.Namespace) -> None:
    """Run what is missing; each result is in the file as soon as its run ends."""
    results = read_results(arguments.results)
    context = get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
        while True:
            done = {(entry["recipe"], entry["lr"], entry["multiplier"], entry["seed"]) for entry in results}
            missing = [
                point
                for point in grid(results, arguments.seeds)
                if (point.recipe, point.lr, point.multiplier, point.seed) not in done
                and (not arguments.only or point.recipe in arguments.only)
            ]
            if not missing:
                return
            print(f"{len(done)} done, {len(missing)} to run", flush=True)
            futures = {
                pool.submit(
                    run_point, point, arguments.steps, arguments.runs_dir, arguments.cache_dir, arguments.threads
                ): point
                for point in missing
            }
            for future in as_completed(futures):
                point, result = futures[future], future.result()
                config = point.config(arguments.steps)
                entry = {
                    **asdict(point),
                    "steps": config.steps,
                    "tokens": config.steps * config.tokens_per_step,
                    "preset": config.model.preset,
                    "final_loss": result.final_loss,
                    "step_ms": result.step_ms,
                    "optimizer_ms": result.optimizer_ms,
                    "weight_norm": result.weight_norm,
                    "threads": result.environment["threads"],
                    "torch": result.environment["torch"],
                }
                results.append(entry)
                results.sort(key=lambda entry: (entry["recipe"], entry["lr"], entry["multiplier"], entry["seed"]))
                write_json(arguments.results, {"runs": results})
                print(f"{time.strftime('%H:%M:%S')}  {point.name}  {result.final_loss}", flush=True)


def write_defaults(results: list[dict], path: Path) -> None:
    """Write the winner of each recipe as its default, quoting the result; recipes without results keep their entry."""
    import tomllib

    table = tomllib.loads(path.read_text(encoding="utf-8"))
    for recipe in {entry["recipe"] for entry in results}:
        entries = [entry for entry in results if entry["recipe"] == recipe]
        best = winner(entries)
        points = len({(entry["lr"], entry["multiplier"]) for entry in entries})
        table[recipe] = {
            "lr": best["lr"],
            "embedding_lr": float(best["multiplier"]),
            "head_lr": float(best["multiplier"]),
            "source": f"{RESULTS.relative_to(HERE.parent).as_posix()}: loss {best['final_loss']:.4f} after "
            f"{entries[0]['steps']} steps, {best['seeds']} seed(s), the best of {points} points",
        }
    lines = ["# Default hyperparameters of every recipe, written by benchmarks/learning_rates.py --write-defaults."]
    for recipe, entry in table.items():
        lines += ["", f'["{recipe}"]', *(f"{key} = {json.dumps(value)}" for key, value in entry.items())]
    write_text(path, "\n".join(lines) + "\n")


def print_table(results: list[dict]) -> None:
    """Losses by recipe, learning rate and multiplier; a winner at the edge of its grid asks for a wider one."""
    for recipe in [*FIRST_STAGE, *SECOND_STAGE]:
        entries = [entry for entry in results if entry["recipe"] == recipe]
        if not entries:
            continue
        best = winner(entries)
        rates = sorted({entry["lr"] for entry in entries})
        edge = "  (at the edge of the grid)" if best["lr"] in (rates[0], rates[-1]) else ""
        print(f"{recipe}: best lr {best['lr']:g} x{best['multiplier']:g}, final loss {best['final_loss']:.4f}{edge}")
        for entry in entries:
            loss = "diverged" if entry["final_loss"] is None else f"{entry['final_loss']:.4f}"
            print(f"    lr {entry['lr']:<8g} x{entry['multiplier']:<4g} seed {entry['seed']}  {loss}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
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
