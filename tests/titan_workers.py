"""What the ranks of tests/integrations/test_torchtitan.py run: torchtitan's own trainer at tiny size, on CPUs.

torchtitan takes the first accelerator of a machine, or CUDA. Before it is imported it is told that the CPU is one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

import spectrim

VOCABULARY, WIDTH, HEAD, LENGTH = 64, 32, 16, 16


def on_cpu() -> None:
    """Have torchtitan run on CPUs; before its first import."""
    torch._utils._get_available_device_type = lambda: "cpu"
    os.environ["LOCAL_RANK"] = "0"
    from torchtitan.components import metrics
    from torchtitan.distributed import utils

    fields = (
        "max_active_gib",
        "max_active_pct",
        "max_reserved_gib",
        "max_reserved_pct",
        "num_alloc_retries",
        "num_ooms",
    )
    peak = SimpleNamespace(**dict.fromkeys(fields, 0.0))
    monitor = SimpleNamespace(device_name="cpu", get_peak_stats=lambda: peak, reset_peak_stats=lambda: None)
    metrics.build_device_memory_monitor = lambda: monitor
    # It names the device of a barrier by its number, and a CPU has none.
    utils.set_pg_timeouts = lambda **_: None


def before_ranks() -> None:
    """Import what every rank needs, once for all of them."""
    on_cpu()
    import torchtitan.models.qwen3
    import torchtitan.trainer  # noqa: F401

    import spectrim.integrations.torchtitan  # noqa: F401


def tiny_qwen3(*, moe: bool) -> Any:
    """Two layers of Qwen3 as torchtitan describes them: fused queries, keys and values; a dense or a routed MLP."""
    from torchtitan.models import qwen3
    from torchtitan.models.common.attention import ScaledDotProductAttention

    rope = qwen3.CosSinRoPE.Config(dim=HEAD, max_seq_len=64, theta=1e4)
    common = {"n_layers": 2, "dim": WIDTH, "n_heads": 4, "n_kv_heads": 2, "head_dim": HEAD, "rope": rope}
    common["attn_backend"] = "flex"
    if moe:
        layers = qwen3._build_qwen3_moe_layers(
            moe_hidden_dim=24, num_experts=4, top_k=2, moe_comm_backend="standard", **common
        )
    else:
        layers = qwen3._build_qwen3_layers(hidden_dim=48, **common)
    for layer in layers:
        # FlexAttention would be compiled.
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    linear = qwen3.Linear.Config(in_features=WIDTH, out_features=VOCABULARY, param_init=qwen3._LINEAR_INIT)
    table = qwen3.Embedding.Config(num_embeddings=VOCABULARY, embedding_dim=WIDTH, param_init=qwen3._EMBEDDING_INIT)
    return qwen3.Qwen3Model.Config(
        vocab_size=VOCABULARY,
        dim=WIDTH,
        norm=qwen3._qwen3_norm(WIDTH),
        tok_embeddings=table,
        lm_head=linear,
        layers=layers,
    )


def trainer(
    folder: str,
    *,
    optimizer: dict[str, Any],
    moe: bool = False,
    dp: int = 1,
    tp: int = 1,
    ep: int = 1,
    steps: int = 4,
    load_step: int = -1,
    backend: str = "partial_dtensor",
) -> Any:
    """torchtitan's trainer over a tiny model and made-up tokens."""
    on_cpu()
    from torchtitan.components.checkpointer import CheckpointManager
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.components.optimizer import LRSchedulersContainer
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.config import ParallelismConfig, TrainingConfig
    from torchtitan.models import qwen3
    from torchtitan.trainer import Trainer

    from spectrim.integrations.torchtitan import SpectralOptimizersContainer

    class NoTokenizer(BaseTokenizer):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseTokenizer.Config):
            pass

        def __init__(self, config: Config, **kwargs: Any) -> None:
            super().__init__()

        def encode(self, *args: Any, **kwargs: Any) -> list[int]:
            raise NotImplementedError

        def decode(self, *args: Any, **kwargs: Any) -> str:
            raise NotImplementedError

        def get_vocab_size(self) -> int:
            return VOCABULARY

    class Counted(BaseDataLoader):
        """Batches that depend on their number and the replica, and no batch twice."""

        @dataclass(kw_only=True, slots=True)
        class Config(BaseDataLoader.Config):
            pass

        def __init__(self, config: Config, *, dp_rank: int, local_batch_size: int, **kwargs: Any) -> None:
            self.rank, self.rows, self.count = dp_rank, local_batch_size, 0

        def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
            while True:
                generator = torch.Generator().manual_seed(1000 * self.rank + self.count)
                self.count += 1
                tokens = torch.randint(VOCABULARY, (self.rows, LENGTH), generator=generator)
                positions = torch.arange(LENGTH).expand(self.rows, -1)
                yield {"input": tokens, "positions": positions}, (3 * tokens + 1) % VOCABULARY

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.count = state_dict["count"]

    spec = qwen3.model_registry("debugmodel_moe" if moe else "debugmodel")
    spec.model = tiny_qwen3(moe=moe)
    spec.state_dict_adapter = None
    made = Trainer.Config(
        model_spec=spec,
        dump_folder=folder,
        tokenizer=NoTokenizer.Config(),
        dataloader=Counted.Config(),
        loss=CrossEntropyLoss.Config(global_vocab_size=VOCABULARY),
        optimizer=SpectralOptimizersContainer.Config(**optimizer),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2, total_steps=8),
        training=TrainingConfig(
            local_batch_size=4,
            seq_len=LENGTH,
            steps=steps,
            mixed_precision_param="float32",
            disable_cuda_graphs=True,
        ),
        parallelism=ParallelismConfig(
            spmd_backend=backend, data_parallel_shard_degree=dp, tensor_parallel_degree=tp, expert_parallel_degree=ep
        ),
        checkpoint=CheckpointManager.Config(
            enable=True, interval=2, last_save_model_only=False, keep_latest_k=0, load_step=load_step
        ),
        activation_checkpoint=None,
    ).build()
    for module in made.model_parts[0].modules():
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            # gloo cannot scale what it sums.
            module.set_force_sum_reduction_for_comms(True)
    return made


def trained(trainer: Any) -> dict[str, torch.Tensor]:
    """Whole weights and optimizer state, by name."""
    found = {name: value for name, value in trainer.optimizers.state_dict().items() if name.startswith("state.")}
    found |= dict(trainer.model_parts[0].named_parameters())
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in found.items()}


def train_and_resume(rank: int, folder: str, settings: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any]:
    """Four steps, and the last two of them again from the checkpoint after two."""
    whole = trainer(folder, optimizer=settings, steps=4, **layout)
    whole.train()
    again = trainer(folder, optimizer=settings, steps=4, load_step=2, **layout)
    again.train()
    optimizer = whole.optimizers.optimizers[0]
    return {
        "whole": trained(whole),
        "resumed": trained(again),
        "metrics": again.lr_schedulers.get_metrics(),
        "described": str(spectrim.describe(optimizer)),
        "shared": optimizer._process_group is not None,
        "steps": {int(optimizer.state[parameter]["step"]) for parameter in optimizer.state},
    }


def load(rank: int, folder: str, settings: dict[str, Any], layout: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What is in the last checkpoint, on this number of ranks."""
    found = trainer(folder, optimizer=settings, steps=4, **layout)
    found.checkpointer.load()
    return trained(found)
