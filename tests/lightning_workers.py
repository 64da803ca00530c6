"""What tests/integrations/test_lightning.py trains, on one process and on ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

import spectrim
from spectrim.integrations.lightning import SpectralMonitor

BATCHES = 8


def tokens(number: int) -> torch.Tensor:
    """Made-up tokens."""
    return torch.randint(48, (8, 12), generator=torch.Generator().manual_seed(number))


class Model(LightningModule):
    """Predicts 3 t + 1 from t. Which batch comes next is in its checkpoints, for a Trainer begins its loaders anew."""

    def __init__(self, recipe: str = "adamw+clip") -> None:
        super().__init__()
        self.recipe = recipe
        generator = torch.random.get_rng_state()
        torch.manual_seed(0)
        self.embed = nn.Embedding(48, 16)
        self.hidden = nn.Linear(16, 24)
        self.back = nn.Linear(24, 16)
        self.lm_head = nn.Linear(16, 48, bias=False)
        torch.random.set_rng_state(generator)
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        return self.lm_head(x + self.back(torch.relu(self.hidden(x))))

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        batch = tokens(int(self.seen))
        self.seen += 1
        return nn.functional.cross_entropy(self(batch).flatten(0, 1), (3 * batch + 1).flatten() % 48)

    def configure_optimizers(self) -> Any:
        optimizer = spectrim.create(self.recipe, self, lr=1e-2, head_lr=0.5)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, total_iters=4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Told(Model):
    """The same, told its optimizer."""

    def __init__(self, optimizer: OptimizerCallable = spectrim.AdamW) -> None:
        super().__init__()
        self.optimizer = optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(spectrim.param_groups(self))


class Sharded(Model):
    """The same, sharded by FSDP2."""

    def configure_model(self) -> None:
        if not hasattr(self.hidden, "unshard"):
            mesh = self.device_mesh["data_parallel"]
            for layer in (self.hidden, self.back, self):
                fully_shard(layer, mesh=mesh)


class Kept(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int | None, dict[str, float]]] = []

    name = "kept"
    version = 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def fit(model: Model, *, steps: int, checkpoint: str | None = None, **options: Any) -> Trainer:
    """Train for so many steps of the optimizer, from a checkpoint if one is given."""
    options.setdefault("logger", False)
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )
    trainer.fit(model, DataLoader(range(BATCHES)), ckpt_path=checkpoint)
    return trainer


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights, whole."""
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in found.items()}


def resume_sharded(rank: int, folder: str) -> dict[str, Any]:
    """Six steps, and the last three of them again from checkpoints after three: sharded ones, and one file."""
    world = torch.distributed.get_world_size()
    # As torchrun says it.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "GROUP_RANK": "0"}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test"}

    def run(steps: int, checkpoint: str | None = None, *, sharded: bool = True) -> tuple[Sharded, Trainer]:
        model = Sharded()
        strategy = ModelParallelStrategy(
            data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=sharded
        )
        options = {"callbacks": [SpectralMonitor(every=2)], "logger": Kept(), "devices": world, "strategy": strategy}
        return model, fit(model, steps=steps, checkpoint=checkpoint, **options)

    through, trainer = run(6)
    found: dict[str, Any] = {
        "through": whole(through),
        "kinds": {type(parameter).__name__ for parameter in through.parameters()},
        "steps": {int(state["step"]) for state in trainer.optimizers[0].state.values()},
    }
    for sharded in (True, False):
        path = str(Path(folder) / f"sharded {sharded}")
        run(3, sharded=sharded)[1].save_checkpoint(path)
        resumed, trainer = run(6, path, sharded=sharded)
        logger: Any = trainer.logger
        steps = [step for step, line in logger.lines if "monitor/ms" in line]
        found[f"resumed, sharded {sharded}"] = (whole(resumed), steps)
    return found
