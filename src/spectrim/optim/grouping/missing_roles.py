"""Warns if groups have no roles, and a recipe would step embeddings or heads as hidden matrices.

Muon and Spectra shape hidden matrices and leave embeddings and heads to plain AdamW. In a plain list of parameters, as
the Trainer of transformers makes it, all 2-D parameters count as hidden matrices. Those that look like embeddings or
heads, by name or else by shape, are reported.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["warn_of_missing_roles"]

_EMBEDDING = re.compile(r"(.*\.)?([^.]*embed[^.]*|wte|wpe|tok_emb|pos_emb|[^.]*_ape)(\..*)?")
# Only outside of numbered layers.
_HEAD = re.compile(
    r"(?!.*\.\d+\.)(.*\.)?(lm_heads?|head|[^.]*_head|output|output_projection|proj_out|unembed|classifier|score|"
    r"qa_outputs)(\.weight)?"
)
#: Matrices with at least this ratio of sides look like a table of tokens. Fused gate and up projections reach 7.
RATIO = 8
#: Number of names or shapes that a warning lists.
LISTED = 6

_ADVICE = (
    "Give spectrim.param_groups(model), which assigns roles; or groups with "
    '"role": "embedding" or "head" for those, which get AdamW, and "role": "matrix" for the others'
)


def warn_of_missing_roles(optimizer: str, groups: Sequence[Mapping[str, Any]]) -> None:
    """Warn of parameters that look like embeddings or heads in groups without a role."""
    plain = [group for group in groups if group.get("role") is None]
    named = [pair for group in plain for pair in zip(group.get("param_names") or (), group["params"], strict=False)]
    nameless = [parameter for group in plain if not group.get("param_names") for parameter in group["params"]]
    looks = [f"{name!r}" for name, p in named if p.ndim == 2 and p.requires_grad and _is_table(name)]
    looks += [f"one of shape {tuple(parameter.shape)}" for parameter in _tables(nameless)]
    if looks:
        more = f" and {len(looks) - LISTED} more" if len(looks) > LISTED else ""
        listed = f"{', '.join(looks[:LISTED])}{more}"
        _warn(f"{optimizer} treats parameters that look like embeddings or heads as hidden matrices: {listed}")
    elif _is_whole_model(nameless):
        count = len(_matrices(nameless))
        _warn(f"{optimizer} treats all {count} matrices as hidden: without names, embeddings and heads are not found")


def _warn(message: str) -> None:
    warnings.warn(f"{message}. {_ADVICE}.", stacklevel=5)


def _is_table(name: str) -> bool:
    return bool(_EMBEDDING.fullmatch(name) or _HEAD.fullmatch(name))


def _matrices(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter for parameter in parameters if parameter.ndim == 2 and parameter.requires_grad]


def _tables(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Matrices far longer than wide, whose length few others have. LoRA's factors, which are long too, share theirs."""
    found = _matrices(parameters)
    lengths = Counter(max(parameter.shape) for parameter in found)
    return [
        parameter
        for parameter in found
        if max(parameter.shape) >= RATIO * min(parameter.shape) and lengths[max(parameter.shape)] <= 2 < len(found)
    ]


def _is_whole_model(parameters: Sequence[Tensor]) -> bool:
    """True if there are both vectors and matrices, so that the caller did not select the hidden matrices."""
    return len(_matrices(parameters)) > 2 and any(parameter.ndim < 2 for parameter in parameters)
