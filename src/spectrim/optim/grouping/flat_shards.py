"""Detects flat shards: 1-D parts of several matrices, as FSDP1 and DeepSpeed ZeRO make them.

Without this check a flat shard would be clipped by its norm as one long vector, and steps would silently be far too
small. Attributes that the frameworks set on tensors are checked; no framework is imported.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["check_group", "check_whole", "count_matrices", "warn_of_long_vectors"]

_FSDP2 = (
    "use FSDP2 (torch.distributed.fsdp.fully_shard; fsdp_version: 2 in accelerate), whose parameters keep their shapes"
)
_STAGE_0 = f"{_FSDP2}, or ZeRO stage 0"
#: (attribute that a framework sets on a parameter, its meaning, what to use instead).
_MARKS = (
    ("_is_flat_param", "a flat parameter of FSDP1 (FullyShardedDataParallel)", _FSDP2),
    ("_fsdp_flattened", "a part of a flat parameter of FSDP1 (FullyShardedDataParallel)", _FSDP2),
    ("ds_id", "partitioned by DeepSpeed ZeRO stage 3", _STAGE_0),
    ("ds_tensor", "partitioned by DeepSpeed ZeRO stage 3", _STAGE_0),
    ("_hp_mapping", "a copy of a flat partition of DeepSpeed ZeRO stage 1 or 2", _STAGE_0),
)
#: If all parameters are vectors and one is this long, they may be flat shards. Biases of a vocabulary are as long, but
#: come together with matrices.
LONG = 10_000


def check_whole(parameter: Tensor, name: str) -> None:
    """Raise ValueError if a framework has flattened the parameter; the message names a replacement."""
    for mark, what, instead in _MARKS:
        # FSDP1 sets its flag to False on parameters that it did not flatten.
        if getattr(parameter, mark, False) is not False:
            raise ValueError(f"{name} is {what}, which does not keep the shapes of matrices: {instead}")


def count_matrices(parameters: Sequence[Tensor]) -> int:
    """How many of a group's parameters have two dimensions or more."""
    return sum(parameter.ndim > 1 for parameter in parameters)


def check_group(group: Mapping[str, Any], where: str) -> None:
    """Raise ValueError if a framework has replaced a group's matrices by vectors since the group was made."""
    if group.get("matrices") and group["params"] and not count_matrices(group["params"]):
        shapes = ", ".join(str(tuple(parameter.shape)) for parameter in group["params"][:3])
        raise ValueError(
            f"{where} was made with {group['matrices']} matrices and now holds vectors only, of shapes {shapes}: "
            f"flat shards, as of DeepSpeed ZeRO stages 1, 2 and 3 or Megatron's distributed optimizer, do not keep the "
            f"shapes of matrices: {_STAGE_0}"
        )


def warn_of_long_vectors(groups: Sequence[Mapping[str, Any]]) -> None:
    """Warn if all parameters of an optimizer are vectors without a role and one of them is long."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    if any(group.get("role") is not None for group in groups) or count_matrices(parameters):
        return
    longest = max((parameter.numel() for parameter in parameters), default=0)
    if longest >= LONG:
        warnings.warn(
            f"all parameters are vectors, the longest of {longest:,} entries, and are clipped by their norms. If they "
            f"are flat shards of matrices, steps are far too small: {_FSDP2}. If they are vectors, use groups like "
            f'{{"params": ..., "role": "vector", "layout": "vector"}}',
            stacklevel=4,
        )
