"""Trains one run into a folder with its log, checkpoints, model and result.

A run is a function of its configuration. Stopped at any moment and resumed, it ends with the same weights and the
same log as if it had not been stopped. On several processes it differs by rounding alone.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from spectrim.lab.config import TrainConfig
from spectrim.lab.data.tokens import Tokens, prepare_tokens, resolve_data
from spectrim.lab.errors import LabError
from spectrim.lab.files import remove_partial, write_folder_atomically, write_json
from spectrim.lab.logging.dynamics import read_dynamics
from spectrim.lab.logging.log import read_log
from spectrim.lab.logging.run_result import Curve, Plan, RunResult
from spectrim.lab.models.architecture import resolve_model
from spectrim.lab.models.build import build_model, save_model
from spectrim.lab.recipes.names import build_optimizer, resolve
from spectrim.lab.settings import leaves
from spectrim.lab.training.device import check_device, choose_device, choose_precision, environment, training_device
from spectrim.lab.training.folder import RunFolder
from spectrim.lab.training.loop import OnStep, Training, run_steps
from spectrim.lab.training.monitoring import OnMeasure, exact_patterns
from spectrim.lab.training.processes import ONE_PROCESS, Parallel
from spectrim.lab.training.run_statistics import largest_singular_value, state_bytes, step_times, weight_norm
from spectrim.optim.describe import describe

__all__ = ["prepare", "train"]


def prepare(config: TrainConfig) -> TrainConfig:
    """Check a configuration and fill in defaults, so that it describes its run completely.

    Raises:
        LabError: a recipe, model or device does not exist, or settings contradict each other.
    """
    check_device(config.device)
    # Data first: a source may need the network, which the lab disables for transformers.
    data = resolve_data(config.data, weights=config.model.weights)
    settled: dict[str, Any] = {"data": data, "model": resolve_model(config.model)}
    settled["precision"] = choose_precision(config.precision, config.device)
    return resolve(config.model_copy(update=settled))


def train(
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    cache_dir: Path | None = None,
    on_step: OnStep | None = None,
    on_measure: OnMeasure | None = None,
    parallel: Parallel = ONE_PROCESS,
    compiled: bool = False,
) -> RunResult:
    """Train one model into the folder ``out``, or finish the run that was begun there.

    Args:
        config: what to train; see :func:`prepare`.
        out: a new or empty folder, or with ``resume`` the folder of a run with this configuration.
        resume: go on from the last checkpoint; a finished run is returned as it is.
        cache_dir: where tokens are cached; :func:`spectrim.lab.data.tokens.default_cache_dir` by default.
        on_step: called with every record that is logged.
        on_measure: called with every record of the monitor, see :class:`spectrim.SpectralMonitor`.
        parallel: this rank, from :func:`spectrim.lab.training.processes.open_parallel`. Every rank calls this function
            with the same arguments; rank 0 writes.
        compiled: compile the model's training step with ``torch.compile``; evaluation stays eager. Like ``parallel`` it
            is no setting of the run: weights keep their names, and a run may be resumed with it or without.

    Raises:
        LabError: the input is wrong, or ranks disagree about it. ``out`` is then unchanged.
        Interrupted: Ctrl-C or SIGTERM came. ``resume`` continues the run from there.
        OSError: a write failed, as on a full disk. Files written before are complete.
    """
    folder = RunFolder(out)

    def may_go_on() -> bool:
        return resume or parallel.has_begun(out)

    if config.precision == "auto" and may_go_on() and (stored := folder.stored_config()):
        config = config.model_copy(update={"precision": stored.precision})
    config = prepare(config)
    device = training_device(config.device)
    if parallel.ranks > 1 and ":" in config.device:
        raise LabError(f"device {config.device!r} with {parallel.ranks} processes: each has its own, give cuda")
    parallel.agree(
        {"--out": str(out), "--resume": resume, "--compile": compiled, **dict(leaves(config.model_dump(mode="json")))}
    )
    parallel.check_batch(config.data.batch_size, config.accumulate)

    def begin() -> RunResult | None:
        folder.check(config, resume=may_go_on())
        parallel.mark_begun(out)
        return folder.result()

    if (finished := parallel.from_first(begin)) is not None:
        return finished
    tokens = parallel.first_then_all(lambda: prepare_tokens(config.data, cache_dir))
    parallel.agree({"data_key": tokens.key})

    # Keep the caller's random state; the run's own depends on its seed alone.
    with torch.random.fork_rng(), on(device):
        torch.manual_seed(config.seed)
        model, module, whole_model = place(lambda: initial_model(config, tokens), parallel, device)
        if compiled:
            # The wrapper is called in training alone; names of parameters and evaluation are the model's.
            module = cast(nn.Module, torch.compile(module, dynamic=False))
        run = Training(
            config=config,
            folder=folder,
            tokens=tokens,
            model=model,
            module=module,
            optimizer=build_optimizer(model, config),
            device=device,
            parallel=parallel,
            compiled=compiled,
            on_step=on_step,
            on_measure=on_measure,
        )
        exact_patterns(model, config.monitor)  # raises if a layer does not exist
        with ExitStack() as stack:
            if (finished := parallel.from_first(lambda: claim(run, stack, resume=may_go_on()))) is not None:
                return finished
            run_steps(run)
            whole = whole_model()
            return parallel.from_first(lambda: finish(run, whole))


def initial_model(config: TrainConfig, tokens: Tokens) -> nn.Module:
    """The whole model before its first step."""
    return build_model(
        config.model,
        vocabulary_size=tokens.vocabulary_size,
        sequence_length=config.data.sequence_length,
        seed=config.seed,
        end_of_document=tokens.end,
        padded=tokens.padded,
    )


def claim(run: Training, stack: ExitStack, *, resume: bool) -> RunResult | None:
    """Create the run's folder and lock it until the stack closes; returns the result if another process has finished
    the run in the meantime.
    """
    folder = run.folder
    folder.create(run.config, resume=resume)
    stack.enter_context(folder.lock())
    folder.check(run.config, resume=True)
    if not folder.has_checkpoints:
        folder.update(run.config)
    remove_partial(folder.path)
    return folder.result()


def finish(run: Training, whole: nn.Module) -> RunResult:
    """Write the whole trained model and the run's result."""
    write_folder_atomically(run.folder.model, lambda partial: save_model(whole, run.tokens, partial))
    result = measure(run, whole)
    run.folder.update(run.config)
    write_json(run.folder.result_file, result.model_dump(mode="json"))
    return result


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current device inside the context."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def place(
    build: Callable[[], nn.Module], parallel: Parallel, device: torch.device
) -> tuple[nn.Module, nn.Module, Callable[[], nn.Module]]:
    """The model on its device, the module to call in training, and a function that gathers the whole model on rank
    0."""
    model = build()
    if parallel.ranks == 1:
        model = model.to(device)
        return model, model, lambda: model
    from spectrim.lab.training.placement import spread, whole_state

    module = spread(model, parallel, device)

    def whole_model() -> nn.Module:
        state = whole_state(model)
        if not parallel.is_first:
            return model
        whole = build()
        whole.load_state_dict(state)
        return whole

    return model, module, whole_model


def measure(run: Training, model: nn.Module) -> RunResult:
    """The result of a run whose steps are all done; times and losses come from its log."""
    config = run.config
    records = read_log(run.folder.log_file)
    evaluated = [record for record in records if "val_loss" in record]
    dynamics = read_dynamics(records)
    if dynamics is not None and dynamics.skipped == len(records):
        # Without a finite gradient the model was never trained, so its loss is no result.
        evaluated = [{**record, "val_loss": None} for record in evaluated]
    settings = config.optimizer
    assert settings.lr is not None
    assert settings.embedding_lr is not None
    assert settings.head_lr is not None
    # Describe a new optimizer: before the first step its learning rate is the peak.
    description = describe(build_optimizer(model, config))
    return RunResult(
        recipe=config.recipe,
        seed=config.seed,
        lr=settings.lr,
        embedding_lr=settings.embedding_lr,
        head_lr=settings.head_lr,
        clip_bound=settings.clip_bound,
        final_loss=evaluated[-1]["val_loss"],
        state_bytes=state_bytes(run.optimizer),
        weight_norm=weight_norm(model),
        largest_singular_value=largest_singular_value(model),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        curve=Curve(
            tokens=tuple(record["tokens"] for record in evaluated),
            val_loss=tuple(record["val_loss"] for record in evaluated),
        ),
        data_key=run.tokens.key,
        val_loss_by_frequency=evaluated[-1].get("val_loss_by_frequency"),
        environment={
            **environment(choose_device(config.device)),
            "precision": config.precision,
            "compiled": "yes" if run.compiled else "no",
            **run.parallel.describe(),
        },
        plan=Plan(summary=description.summary(), rows=tuple(description.cells())),
        dynamics=dynamics,
        **step_times(records),
    )
