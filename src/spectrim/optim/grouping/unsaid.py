"""A warning where nobody said what parameters are, and a recipe for hidden matrices would take embeddings for some.

Muon and Spectra shape hidden matrices and leave embeddings and heads to plain AdamW. A plain list of parameters, as the
Trainer of transformers makes, is taken at its word: all of two dimensions are matrices. What looks like an embedding or
a head there is told, by name where names are known, else by shape.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["warn_of_unsaid_roles"]

_EMBEDDING = re.compile(r"(.*\.)?([^.]*embed[^.]*|wte|wpe|tok_emb|pos_emb|[^.]*_ape)(\..*)?")
# On top of a model, not in one of its numbered layers.
_HEAD = re.compile(
    r"(?!.*\.\d+\.)(.*\.)?(lm_heads?|head|[^.]*_head|output|output_projection|proj_out|unembed|classifier|score|"
    r"qa_outputs)(\.weight)?"
)
#: Rows to columns, or columns to rows, from which on a matrix looks like one row for each token: projections of gates
#: and ups together have up to 7.
RATIO = 8
#: How many names or shapes a warning lists.
LISTED = 6

_ADVICE = (
    "Give spectrim.param_groups(model), which tells what each is; or groups with "
    '"role": "embedding" or "head" for those, which get AdamW, and "role": "matrix" for the others'
)


def warn_of_unsaid_roles(optimizer: str, groups: Sequence[Mapping[str, Any]]) -> None:
    """Warn, once for an optimizer, of what looks like embeddings and heads in groups that have no role."""
    plain = [group for group in groups if group.get("role") is None]
    named = [pair for group in plain for pair in zip(group.get("param_names") or (), group["params"], strict=False)]
    nameless = [parameter for group in plain if not group.get("param_names") for parameter in group["params"]]
    looks = [f"{name!r}" for name, p in named if p.ndim == 2 and p.requires_grad and _is_table(name)]
    looks += [f"one of shape {tuple(parameter.shape)}" for parameter in _tables(nameless)]
    if looks:
        more = f" and {len(looks) - LISTED} more" if len(looks) > LISTED else ""
        listed = f"{', '.join(looks[:LISTED])}{more}"
        _warn(f"{optimizer} takes for hidden matrices what looks like embeddings or heads: {listed}")
    elif _is_whole_model(nameless):
        count = len(_matrices(nameless))
        _warn(f"{optimizer} takes all {count} matrices for hidden ones: embeddings and heads do not show without names")


def _warn(message: str) -> None:
    warnings.warn(f"{message}. {_ADVICE}.", stacklevel=5)


def _is_table(name: str) -> bool:
    return bool(_EMBEDDING.fullmatch(name) or _HEAD.fullmatch(name))


def _matrices(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter for parameter in parameters if parameter.ndim == 2 and parameter.requires_grad]


def _tables(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Matrices far longer than wide, of a length that few others have: LoRA's factors share theirs with many."""
    found = _matrices(parameters)
    lengths = Counter(max(parameter.shape) for parameter in found)
    return [
        parameter
        for parameter in found
        if max(parameter.shape) >= RATIO * min(parameter.shape) and lengths[max(parameter.shape)] <= 2 < len(found)
    ]


def _is_whole_model(parameters: Sequence[Tensor]) -> bool:
    """Vectors among a few matrices: nobody has picked the hidden ones."""
    return len(_matrices(parameters)) > 2 and any(parameter.ndim < 2 for parameter in parameters)
