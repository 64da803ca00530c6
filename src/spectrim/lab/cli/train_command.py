"""``spectrim train``: trains one model with one recipe."""

import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.lab.cli import shared_options as shared
from spectrim.lab.cli.flags import RECIPE_HELP, configure, trust_named, with_settings
from spectrim.lab.config import TrainConfig
from spectrim.lab.errors import LabError, LabWarning

__all__ = ["train_command"]


@with_settings(TrainConfig)
def train_command(
    given: dict[str, Any],
    compiled: shared.Compile = False,
    parallel: Annotated[
        str | None,
        typer.Option(
            metavar="fsdp|ddp|hsdp|tp",
            help="Under torchrun, how the model is spread. [dim]\\[default: fsdp][/dim]",
            rich_help_panel="Training",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; new or empty unless --resume.", rich_help_panel=shared.FILES)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.", rich_help_panel=shared.FILES)
    ] = False,
    config_file: shared.ConfigFile = None,
    trust_recipes: shared.TrustRecipes = False,
    show_config: shared.ShowConfig = False,
    cache_dir: shared.CacheDir = None,
    as_json: shared.Json = False,
) -> None:
    """Train one model with one recipe; --resume continues bit for bit.

    On several processes: torchrun --nproc-per-node N -m spectrim train ... --batch-size counts the sequences of all
    processes.
    """
    from spectrim.lab.logging.terminal import TerminalProgress
    from spectrim.lab.training.folder import RunFolder
    from spectrim.lab.training.processes import open_parallel
    from spectrim.lab.training.run import prepare
    from spectrim.lab.training.run import train as run_training

    if out is None and not show_config:
        raise LabError("--out is missing: name the folder that the run is to be written to")
    if resume and config_file is None and out is not None and RunFolder(out).config_file.is_file():
        config_file = RunFolder(out).config_file
    if "recipe" not in given and config_file is None:
        raise LabError(f"RECIPE is missing: {RECIPE_HELP}")
    trust_named(given, trust_recipes)
    config = prepare(configure(TrainConfig, config_file, given))
    if out is None or show_config:
        print(config.to_toml(), end="")
        return
    with open_parallel(parallel) as processes:
        how: dict[str, Any] = {"resume": resume, "cache_dir": cache_dir, "parallel": processes, "compiled": compiled}
        train_here = partial(run_training, config, out, **how)
        if not processes.is_first:
            train_here()
            return
        with TerminalProgress(runs=1, steps=config.steps) as monitor:
            monitor.run_started(config)
            result = train_here(on_step=monitor.step, on_measure=monitor.measured)
            monitor.run_finished(config, result)
    if as_json:
        shared.show(result.model_dump(mode="json"), True)
    skipped = result.dynamics.skipped if result.dynamics else 0
    measured = ", monitor.jsonl" if RunFolder(out).monitor_file.is_file() else ""
    print(f"written to {out}: model/, log.jsonl{measured}, config.toml, result.json", file=sys.stderr)
    if skipped == config.steps:
        raise LabError(f"no gradient was finite in the {skipped} steps of {out}, so its model is untrained")
    if skipped:
        message = f"{skipped} of {config.steps} steps in {out} were skipped, since their gradient was not finite"
        warnings.warn(message, LabWarning, stacklevel=1)
