"""torchtitan: a container of one spectrim optimizer, with its config, in place of torchtitan's own.

    config.optimizer = SpectralOptimizersContainer.Config(name="adamw+clip", lr=8e-4, options={"weight_decay": 0.1})

torchtitan's container groups parameters by name patterns; this one reads the model. State under full names, which other
pipeline stages and numbers of ranks can load, hooks and schedulers are inherited.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torchtitan.components.checkpointer.utils import canonical_fqn
from torchtitan.components.optimizer import OptimizersContainer

from spectrim.distributed.dtensor import is_dtensor
from spectrim.optim import SpectralOptimizer, create, param_groups

__all__ = ["SpectralOptimizersContainer"]


class SpectralOptimizersContainer(OptimizersContainer[SpectralOptimizer]):
    """One spectrim optimizer over all model parts of a rank.

    All ranks skip a step together, also if they are stages of a pipeline without a common mesh.

    Raises:
        ValueError: an unknown recipe or option, or a config with torchtitan's ``param_groups``.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """The arguments of :func:`spectrim.create`. torchtitan's ``implementation`` is ignored."""

        name: str = "adamw+clip"
        """One of ``spectrim.recipes()``."""

        lr: float = 8e-4
        """Peak learning rate."""

        options: dict[str, Any] = field(default_factory=dict)
        """Further options of the recipe's optimizer, such as ``{"weight_decay": 0.1, "betas": (0.9, 0.95)}``."""

        embedding_lr: float = 1.0
        """Factor on the learning rate of embeddings."""

        head_lr: float = 1.0
        """Factor on the learning rate of the output head."""

        split: dict[str, Any] = field(default_factory=dict)
        """Fused projections of unknown models; see ``spectrim.param_groups``."""

        overrides: dict[str, Any] = field(default_factory=dict)
        """Name pattern -> values that replace the detected ones; see ``spectrim.param_groups``."""

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        if config.param_groups:
            patterns = ", ".join(repr(group.pattern) for group in config.param_groups)
            raise ValueError(
                f"param_groups with the patterns {patterns}: expected none; overrides= takes patterns here"
            )
        self.model_parts = model_parts
        groups = [
            _with_canonical_names(group)
            for part in model_parts
            for group in param_groups(
                part,
                embedding_lr=config.embedding_lr,
                head_lr=config.head_lr,
                split=config.split,
                overrides=config.overrides,
            )
        ]
        parameters = [parameter for group in groups for _, parameter in group["params"]]
        options = {**_settling(parameters), **config.options}
        optimizer = create(config.name, groups, lr=config.lr, **options)
        self.optimizers = [optimizer]
        self._log_optimizer(optimizer, 0, [str(group["role"]) for group in optimizer.param_groups])
        self._validate_params(parameters)
        self._post_init(parameters)


def _with_canonical_names(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group with the names of torchtitan's checkpoints, without wrappers of activation checkpointing."""
    return {**group, "params": [(canonical_fqn(name), parameter) for name, parameter in group["params"]]}


def _settling(parameters: Iterable[Tensor]) -> dict[str, Any]:
    """The process group of all ranks as an option, if no parameter's mesh has all ranks."""
    sizes = [parameter.device_mesh.size() for parameter in parameters if is_dtensor(parameter)]
    if not sizes or max(sizes) == dist.get_world_size():
        return {}
    return {"process_group": dist.group.WORLD}
