"""Tiny models, data and runs of the Trainer and of accelerate, and what ranks run with them."""

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import spectrim
import worlds
from spectrim.integrations.transformers import LearningRates, OptimizerFactory, SpectralMonitor

LR = 1e-2


class Tokens(Dataset):
    """Sequences that follow from their index."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(64, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def model() -> GPT2LMHeadModel:
    """Fused projections in layers that hold their weights transposed, and a head that is tied to the embedding."""
    torch.manual_seed(0)
    dropped = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    shape = {"vocab_size": 64, "n_positions": 12, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**shape, **dropped, bos_token_id=0, eos_token_id=0, use_cache=False))


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Six steps, with a checkpoint after the third."""
    fixed = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "data_seed": 0}
    steps = {"max_steps": 6, "save_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 4}
    return TrainingArguments(str(folder), **{**fixed, **steps, **options})


def trainer(
    folder: Path, recipe: dict[str, Any] | None = None, *, net: nn.Module | None = None, **options: Any
) -> Trainer:
    """With a recipe, or with what the arguments say."""
    own = {} if recipe is None else {"optimizer_cls_and_kwargs": (OptimizerFactory, {"lr": LR, **recipe})}
    return Trainer(net or model(), arguments(folder, **options), train_dataset=Tokens(), eval_dataset=Tokens(), **own)


def weights(net: nn.Module) -> dict[str, Tensor]:
    """Every parameter, whole, under the name that it has without wrappers."""
    found = {}
    for name, parameter in net.named_parameters():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        found[name.replace("_orig_mod.", "").replace("module.", "")] = whole.detach().clone()
    return found


def state(optimizer: Any) -> dict[str, Tensor]:
    """An optimizer's state by parameter and key, what this process holds of it."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return {
        f"{name}.{key}": (value.to_local() if hasattr(value, "to_local") else value).clone()
        for group in inner.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        for key, value in inner.state[parameter].items()
    }


# -- On ranks ----------------------------------------------------------------------------------------------------------


@functools.cache
def two_ranks() -> list[dict[str, Any]]:
    """What two ranks found, of the Trainer and of accelerate; both at once, for starting ranks takes the longest."""
    with tempfile.TemporaryDirectory() as folder:
        return worlds.run(2, _on_rank, folder)


def _on_rank(rank: int, folder: str) -> dict[str, Any]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    # accelerate shards on accelerators alone; it is told that these processes have some.
    PartialState.set_device = _on_cpu
    return {"accelerate": accelerate_on_ranks(Path(folder)), "trainer": trainer_on_ranks(Path(folder))}


def _on_cpu(partial: Any) -> None:
    partial.device, partial.distributed_type = torch.device("cpu"), DistributedType.MULTI_GPU


def trainer_on_ranks(folder: Path) -> dict[str, Any]:
    """A run, and one that resumes it."""
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"]}
    options = {"fsdp": True, "fsdp_config": config, "per_device_train_batch_size": 2}
    found = {}
    for resume in (None, str(folder / "checkpoint-3")):
        run = trainer(folder, {"name": "adamw+clip"}, **options)
        LearningRates(run)
        SpectralMonitor(run, every=2, out=folder / "monitor.jsonl")
        run.train(resume_from_checkpoint=resume)
        found["resumed" if resume else "run"] = {
            "weights": weights(run.model),
            "state": state(run.optimizer),
            "logs": run.state.log_history,
            "sharded": all(hasattr(parameter, "full_tensor") for parameter in run.model.parameters()),
        }
    return found


def accelerate_on_ranks(folder: Path) -> dict[str, Any]:
    """Four steps at once, and with a checkpoint after the second that another process loads before its first step."""
    found = {}
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        straight = steps(sharded(kind), 4)
        steps(sharded(kind), 2, save=folder / kind)
        found[kind] = straight, steps(sharded(kind), 4, load=folder / kind)
    return found


def sharded(kind: str) -> Accelerator:
    """One that shards the model's blocks."""
    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2Block"],
        state_dict_type=kind,
        cpu_ram_efficient_loading=False,
    )
    return Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=2)


def steps(
    accelerator: Accelerator,
    until: int,
    *,
    recipe: str = "adamw+clip",
    save: Path | None = None,
    load: Path | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and state after some steps of two micro-batches each, the first two from a checkpoint if given."""
    net = model()
    optimizer = spectrim.create(recipe, net, lr=LR)
    loader = DataLoader(Tokens(), 4 // accelerator.num_processes)
    net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    if load is not None:
        accelerator.load_state(str(load))
    batches = list(loader)[: 2 * until]
    for batch in batches[4:] if load is not None else batches:
        with accelerator.accumulate(net):
            accelerator.backward(net(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    if save is not None:
        accelerator.save_state(str(save))
    found = weights(net), state(optimizer)
    accelerator.free_memory()
    return found
