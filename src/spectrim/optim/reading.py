"""Reads what every parameter of a model is.

The module that holds a parameter decides: an embedding's weight is an embedding, a linear layer's weight a matrix
unless the layer is an output head. Only parameters that a model holds without a layer around them are read by their
names. A parameter that no rule knows stays unread, and ``param_groups`` asks for a declaration instead of guessing
from its shape.

The decisions that are not obvious:

- Embeddings are tables of token, position, type or relative-position vectors, as modules or as plain parameters
  (``cls_token``, ``position_embeddings``). A weight tied between embedding and output head is an embedding.
- Heads map features to the model's outputs: language-model heads, classifiers, question-answering and regression
  outputs. The hidden layers before them (a pooler, BERT's prediction transform) are matrices.
- Routers of experts are matrices: linear maps of the residual stream like any other.
- State-space parameters (``A_log``, ``D``, ``dt_bias``) are vectors whatever their dimensions: each entry is the rate
  of one channel or state, and no vector is multiplied by them. Depthwise convolutions are vectors for the same
  reason: every channel has its own few weights. Other convolutions are flattened, one matrix for each of their
  groups.
- LoRA's factors are matrices. The factor that carries the vocabulary takes the role of the layer that it adapts, and
  the output factor of a fused layer is split as that layer is.

Relied on by :mod:`groups`; relies on :mod:`known_models` for fused layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from torch import nn

from .known_models import expert_reading, fused_outputs
from .roles import Reading, Site, sites

__all__ = ["read_model", "read_site"]

VECTOR = Reading("vector", "vector")
MATRIX = Reading("matrix", "matrix")
EMBEDDING = Reading("embedding", "matrix")

_HEAD_NAMES = frozenset(
    {"lm_head", "embed_out", "output_projection", "score", "classifier", "qa_outputs", "seq_relationship"}
)
# Too common inside of models to mean a head anywhere but on top.
_HEAD_NAMES_ON_TOP = frozenset({"head", "output", "proj_out"})
_VECTOR_NAMES = re.compile(r"A_log|A|D|dt_bias|bias|(.*_)?(bias|scale|gain|gamma|beta|decay)(_.*)?")
_EMBEDDING_NAMES = re.compile(r"(.*_)?(embed|embedding|embeddings|token|tokens|pos|queries|table)(_.*)?")


def read_model(model: nn.Module) -> dict[str, Reading | None]:
    """The reading of every parameter under the first of its names; None where no rule knows the parameter.

    A tied parameter is an embedding if any of its places is one, else a head if any is, else what its first place says.
    """
    places: dict[int, list[Site]] = {}
    for site in sites(model):
        places.setdefault(id(site.parameter), []).append(site)
    return {found[0].name: _read_places(found) for found in places.values()}


def _read_places(found: list[Site]) -> Reading | None:
    readings = [reading for reading in map(read_site, found) if reading is not None]
    rank = {"embedding": 0, "head": 1}
    return min(readings, key=lambda reading: rank.get(reading.role, 2), default=None)


def read_site(site: Site) -> Reading | None:
    """The reading of a parameter by one of its places: the answer of the first rule that has one."""
    return next((reading for rule in _RULES if (reading := rule(site)) is not None), None)


def _single_axis(site: Site) -> Reading | None:
    """One axis (biases, gains of norms) is never a matrix."""
    return VECTOR if len(site.shape) < 2 else None


def _norm(site: Site) -> Reading | None:
    return VECTOR if "Norm" in site.kind else None


def _embedding(site: Site) -> Reading | None:
    is_embedding = isinstance(site.holder, nn.Embedding | nn.EmbeddingBag) or "Embedding" in site.kind
    return EMBEDDING if is_embedding and site.leaf == "weight" and len(site.shape) == 2 else None


def _convolution(site: Site) -> Reading | None:
    groups = getattr(site.holder, "groups", None)
    if site.leaf != "weight" or not isinstance(site.holder, nn.Conv1d | nn.Conv2d | nn.Conv3d) or groups is None:
        return None
    if groups == 1:
        return Reading("matrix", "flatten")
    if site.shape[1] == 1:
        return VECTOR
    return Reading("matrix", "flatten", (site.shape[0] // groups,) * groups)


def _adapter(site: Site) -> Reading | None:
    """LoRA's second factor follows the layer that it adapts; the first is a plain matrix."""
    if site.leaf == "weight" and len(site.path) > 2 and site.path[-2] == "lora_B":
        adapted = replace(site, path=site.path[:-2], owners=(*site.owners[:-3], site.holder))
        return _linear(adapted)
    return None


def _linear(site: Site) -> Reading | None:
    if site.leaf != "weight" or len(site.shape) != 2:
        return None
    transposed = site.kind == "Conv1D"
    if not (transposed or isinstance(site.holder, nn.Linear) or "Linear" in site.kind):
        return None
    layout = "transposed" if transposed else "matrix"
    if _is_head(site):
        return Reading("head", layout)
    return Reading("matrix", layout, fused_outputs(site, site.shape[1] if transposed else site.shape[0]))


def _is_head(site: Site) -> bool:
    on_top = len(site.path) == 1 and site.attribute in _HEAD_NAMES_ON_TOP
    return site.is_output or on_top or site.attribute in _HEAD_NAMES


def _router(site: Site) -> Reading | None:
    is_router = "Router" in site.kind or "Gate" in site.kind
    return MATRIX if is_router and site.leaf == "weight" and len(site.shape) == 2 else None


def _bare(site: Site) -> Reading | None:
    """A parameter without a layer around it, by its name."""
    if _VECTOR_NAMES.fullmatch(site.leaf):
        return VECTOR
    if _EMBEDDING_NAMES.fullmatch(site.leaf):
        if len(site.shape) == 2:
            return EMBEDDING
        if len(site.shape) == 3 and site.shape[0] == 1:
            return Reading("embedding", "stack")
    return None


_RULES: tuple[Callable[[Site], Reading | None], ...] = (
    _single_axis,
    _norm,
    _embedding,
    _convolution,
    _adapter,
    _linear,
    _router,
    expert_reading,
    _bare,
)
