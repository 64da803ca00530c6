"""``spectrim bench``: what operators, optimizers and the training loop cost, as tables, JSON and a picture."""

from typing import Any

import typer

from spectrim.lab.bench.settings import OperatorBench, OptimizerBench, TrainingBench, parse_shapes
from spectrim.lab.cli.flags import configure, with_settings
from spectrim.lab.cli.shared_options import FILES, CacheDir, print_tables
from spectrim.lab.files import write_json

__all__ = ["bench_command"]

bench_command = typer.Typer(no_args_is_help=True, help="Measure the speed of operators, optimizers and training.")

MEASURED, TIMING, OUTPUT = "What is measured", "Hardware and timing", FILES


@bench_command.command("operators")
@with_settings(
    OperatorBench,
    {
        MEASURED: ("shapes", "solvers", "dtypes", "spectra", "ratio"),
        TIMING: ("device", "threads", "repeats"),
        OUTPUT: ("json_path", "plot"),
    },
)
def operators(given: dict[str, Any]) -> None:
    """Accuracy, time, arithmetic and memory traffic of every clipping solver, and the time of Spectra's shaping.

    "over c": by how much the result breaks its norm bound. "vs ten NS", "vs SVD": how many times faster than the
    paper's ten Newton-Schulz steps and than a singular value decomposition. "/ products": time over that of the two
    products (XXᵀ)X.
    """
    config = configure(OperatorBench, None, given)
    sizes = parse_shapes(config.shapes)
    from rich.console import Console

    from spectrim.lab.bench import operator_bench
    from spectrim.lab.bench.bench_tables import clip_cells, save_errors, spike_cells, table

    device, repeats = config.device, config.repeats
    with operator_bench.threads(config.threads) as count, Console(stderr=True).status("starting") as status:
        rows = operator_bench.bench_operators(
            sizes,
            solvers=config.solvers,
            dtypes=config.dtypes,
            spectra=config.spectra,
            ratio=config.ratio,
            device=device,
            repeats=repeats,
            progress=status.update,
        )
        status.update("shaping of the spike")
        spikes = operator_bench.bench_spike(sizes, device=device, repeats=repeats)
        if config.plot is not None:
            status.update("error against κ")
            save_errors(operator_bench.error_by_kappa(config.solvers, config.dtypes, device=device), config.plot)
    title = f"soft clip, σ₁/c = {config.ratio:g}, {device}, {count} threads, medians of {repeats}"
    print_tables(
        table(title, [clip_cells(row) for row in rows]),
        table(f"spike shaping, float32, {device}, {count} threads", [spike_cells(row) for row in spikes]),
    )
    write_rows(config, threads=count, clip=rows, spike=spikes)


@bench_command.command("optimizers")
@with_settings(
    OptimizerBench,
    {
        MEASURED: ("block", "blocks", "contender", "compiled"),
        TIMING: ("device", "threads", "repeats"),
        OUTPUT: ("json_path",),
    },
)
def optimizers(given: dict[str, Any]) -> None:
    """Time, memory and orthogonality of a step of every recipe, beside torch's AdamW and Muon.

    All contenders take turns on gradients of their own copy of the weights. "/ fused AdamW": time over that of torch's
    fused AdamW. "Muon /": how many times faster than torch.optim.Muon. "extra": the peak memory of temporary tensors
    during a step. "not orthogonal": ‖UUᵀ/s − I‖_F/√m of the update U, zero for an orthogonal one.
    """
    config = configure(OptimizerBench, None, given)
    import torch
    from rich.console import Console

    from spectrim.lab.bench.bench_tables import optimizer_cells, table
    from spectrim.lab.bench.operator_bench import threads
    from spectrim.lab.bench.optimizer_bench import bench_optimizers

    with threads(config.threads) as count, Console(stderr=True).status("starting") as status:
        rows = bench_optimizers(
            block=config.block,
            blocks=config.blocks,
            contenders=() if config.contender == "all" else [name.strip() for name in config.contender.split(",")],
            repeats=config.repeats,
            compiled=config.compiled,
            device=config.device,
            progress=status.update,
        )
    where = f"{config.device}, {count} threads, medians of {config.repeats}"
    print_tables(
        table(f"one step on {config.blocks} blocks of {config.block}, {where}", [optimizer_cells(row) for row in rows])
    )
    write_rows(
        config, block=config.block, blocks=config.blocks, threads=count, torch=torch.__version__, optimizers=rows
    )


@bench_command.command("training")
@with_settings(
    TrainingBench,
    {
        MEASURED: ("preset", "recipe", "steps", "batch_size", "sequence_length", "sources", "compiled"),
        OUTPUT: ("json_path",),
    },
)
def training(given: dict[str, Any], cache_dir: CacheDir = None) -> None:
    """Tokens a second of the lab's training loop and of a bare one, and what evaluation, log and checkpoints cost."""
    config = configure(TrainingBench, None, given)
    from dataclasses import asdict

    from spectrim.lab.bench.training_bench import bench_training, lines

    row = bench_training(**config.model_dump(exclude={"json_path"}), cache_dir=cache_dir)
    print("\n".join(lines(row)))
    if config.json_path is not None:
        write_json(config.json_path, asdict(row))


def write_rows(config: OperatorBench | OptimizerBench, **result: Any) -> None:
    """Write what was measured to the file that --json names, if it does."""
    from dataclasses import asdict

    if config.json_path is not None:
        rows = {
            key: [asdict(row) for row in value] if isinstance(value, list) else value for key, value in result.items()
        }
        write_json(config.json_path, {"device": config.device, "repeats": config.repeats, **rows})
