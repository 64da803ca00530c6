"""Derives the role and layout of every parameter of a model.

The module that holds a parameter decides: an embedding's weight is an embedding, a linear layer's weight a matrix
unless the layer is an output head. Only parameters outside of layers are classified by their names. If no rule
applies, ``param_groups`` asks for a declaration instead of guessing from the shape.

Decisions that are not obvious:

- Embeddings are tables of token, position, type, latent or relative-position vectors, as modules or as plain
  parameters (``cls_token``, ``position_embeddings``). A weight tied between an embedding and the output head is an
  embedding.
- Heads map features to the model's outputs: language-model heads, classifiers, scores. The hidden layers before them
  (a pooler, BERT's prediction transform) are matrices.
- Routers of experts are matrices, since they map the residual stream linearly.
- State-space parameters (``A_log``, ``D``, ``dt_bias``) are vectors even with two dimensions: each entry is the rate
  of one channel. Depthwise convolutions are vectors too, since every channel has its own few weights. Other
  convolutions are flattened, one matrix for each of their groups.
- LoRA's factors are matrices, with two exceptions: the factor with the vocabulary's dimension takes the role of the
  layer that it adapts, and the output factor of a fused layer is split like that layer. Factors of other PEFT adapters
  are matrices if they are multiplied as matrices, and vectors if they scale or rotate entry by entry. Rows of new
  tokens take the role of the table that they extend.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from torch import nn

from spectrim.optim.grouping.known_models import expert_reading, fused_sizes, known_parameter
from spectrim.optim.grouping.layout import Layout
from spectrim.optim.grouping.roles import Reading, Site, sites

__all__ = ["read_model", "read_site"]

VECTOR = Reading("vector", "vector")
MATRIX = Reading("matrix", "matrix")
EMBEDDING = Reading("embedding", "matrix")
HEAD = Reading("head", "matrix")

_HEADS = frozenset(
    {
        *("lm_head", "lm_heads", "embed_out", "output_projection", "unembed"),
        *("classifier", "score", "qa_outputs", "seq_relationship"),
    }
)
# Names that are too common inside models: they mean a head only at the top level.
_HEADS_ON_TOP = frozenset({"head", "output", "proj_out"})
# Heads of several layers, and the names of their last layers.
_HEAD_MODULES = frozenset({"classifier", "classification_head", "lm_head", "predictions"})
_LAST_OF_A_HEAD = frozenset({"out_proj", "decoder"})

# Names with these endings are weights of layers, whatever else they contain.
_NO_WEIGHT = r"(?!.*(weight|kernel|matrix|proj|projection)$)"
_TABLE_NAMES = re.compile(
    _NO_WEIGHT + r"(relative_(position|attention)_bias(_table)?|position_bias|"
    r"(.*_)?(emb|embed|embedding|embeddings|encoding|position_enc|ape|rel_pos)(_.*)?|"
    r"(.*_)?(token|tokens|latent|latents|probe|query|queries|prompt)(_.*)?)"
)
_VECTOR_NAMES = re.compile(
    _NO_WEIGHT + r"(A_log|A|D|(.*_)?(bias|biases|scale|gain|gamma|beta|alpha|decay)(_.*)?|time_mix_.*)"
)


def read_model(model: nn.Module) -> dict[str, Reading | None]:
    """The reading of every parameter by its first name; None if no rule applies.

    A tied parameter is an embedding if any of its sites is one, else a head if any is, else as its first site says.
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
    """The reading of a parameter at one site, by the first rule that applies."""
    return next((reading for rule in _RULES if (reading := rule(site)) is not None), None)


def _single_axis(site: Site) -> Reading | None:
    """Parameters of one dimension (biases, gains of norms) are vectors."""
    return VECTOR if len(site.shape) < 2 else None


def _parametrized(site: Site) -> Reading | None:
    """A parametrized weight's original is read like the weight; the magnitude of a weight norm is a vector."""
    if "ParametrizationList" in site.kinds and site.leaf in ("original", "original1"):
        return read_site(replace(site, leaf=site.attribute, path=site.path[:-2], owners=site.owners[:-2]))
    magnitude = "ParametrizationList" in site.kinds and site.leaf == "original0"
    return VECTOR if magnitude and max(site.shape) == site.parameter.numel() else None


def _convolution(site: Site) -> Reading | None:
    if site.leaf != "weight" or not isinstance(site.holder, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    groups = site.holder.groups
    if groups == 1:
        return Reading("matrix", "flatten")
    if site.shape[1] == 1:
        return VECTOR
    return Reading("matrix", "flatten", (site.shape[0] // groups,) * groups)


def _adapter(site: Site) -> Reading | None:
    """The factors that PEFT adds to a layer, in dictionaries by adapter name."""
    for depth in (1, 2):
        factor = site.path[-depth] if len(site.path) > depth else ""
        if factor == "trainable_tokens_delta":
            adapted = replace(site, path=tuple(name for name in site.path[:-depth] if name != "token_adapter"))
            return HEAD if _is_head(adapted) else EMBEDDING
        if factor == "lora_B" and _is_linear(site):
            return _linear(replace(site, path=site.path[:-depth], owners=(*site.owners[: -depth - 1], site.holder)))
        if factor in _ADAPTERS:
            reading = _ADAPTERS[factor]
            return reading if len(site.shape) == _DIMENSIONS.get(reading.layout, len(site.shape)) else VECTOR
    return None


_DIMENSIONS = {"matrix": 2, "transposed": 2, "stack": 3, "transposed_stack": 3}
_TRANSPOSED = Reading("matrix", "transposed")
_ADAPTERS = {
    **dict.fromkeys(("lora_A", "lora_B", "lora_embedding_B"), MATRIX),
    "lora_embedding_A": Reading("embedding", "transposed"),
    **dict.fromkeys(("lora_E", "lora_magnitude_vector", "ia3_l"), VECTOR),
    # Factors of low-rank and Kronecker products. Those of convolutions with more dimensions are vectors.
    **dict.fromkeys(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"), MATRIX),
    **dict.fromkeys(("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"), MATRIX),
    **dict.fromkeys(("delora_A", "delora_B", "deft_P", "deft_R", "hira_A", "hira_B", "hra_u"), MATRIX),
    **dict.fromkeys(("glora_A", "glora_B", "glora_C", "osf_svd_params"), MATRIX),
    "miss_block": _TRANSPOSED,
    **dict.fromkeys(("gralora_A", "gralora_B"), Reading("matrix", "transposed_stack")),
    "vblora_vector_bank": EMBEDDING,
    # Angles of rotations, entries of skew matrices, kernels of circulant ones, logits and scales.
    **dict.fromkeys(("oft_R", "boft_R", "boft_s", "c3a_kernel", "vblora_logits_A", "vblora_logits_B"), VECTOR),
    **dict.fromkeys(("randlora_lambda", "randlora_gamma", "poly_lora_A", "poly_lora_B", "poly_router"), VECTOR),
}


def _embedding(site: Site) -> Reading | None:
    is_embedding = isinstance(site.holder, nn.Embedding | nn.EmbeddingBag) or _named_like(site, "Embedding")
    return EMBEDDING if is_embedding and site.leaf == "weight" and len(site.shape) == 2 else None


def _linear(site: Site) -> Reading | None:
    if site.leaf != "weight" or len(site.shape) != 2 or not _is_linear(site):
        return None
    # GPT-2's Conv1D is a linear layer that stores inputs x outputs.
    transposed = "Conv1D" in site.kinds
    layout: Layout = "transposed" if transposed else "matrix"
    if _is_head(site):
        return Reading("head", layout)
    return Reading("matrix", layout, fused_sizes(site, site.shape[1] if transposed else site.shape[0]))


def _is_linear(site: Site) -> bool:
    return isinstance(site.holder, nn.Linear) or _named_like(site, "Linear") or "Conv1D" in site.kinds


def _is_head(site: Site) -> bool:
    if site.is_output:
        return True
    *around, name = site.path or ("",)
    if name.isdigit() and around:
        name = around.pop()
    if any(part.isdigit() for part in around):
        # Inside of a numbered layer: a router's classifier, an inner score.
        return False
    if name in _LAST_OF_A_HEAD and around:
        return around[-1] in _HEAD_MODULES
    return name in _HEADS or (not around and (name in _HEADS_ON_TOP or name.endswith("_head")))


def _norm(site: Site) -> Reading | None:
    return VECTOR if _named_like(site, "Norm") else None


def _router(site: Site) -> Reading | None:
    is_router = any(kind.endswith(("Router", "Gate")) for kind in site.kinds)
    return MATRIX if is_router and site.leaf == "weight" and len(site.shape) == 2 else None


def _named_like(site: Site, word: str) -> bool:
    return any(word in kind for kind in site.kinds)


def _by_name(site: Site) -> Reading | None:
    """A parameter outside of any layer, by its name.

    Tables with several dimensions (grids of positions) are vectors, and so are parameters with one dimension above 1.
    """
    if _TABLE_NAMES.fullmatch(site.leaf):
        if len(site.shape) == 2:
            return EMBEDDING
        return Reading("embedding", "stack") if len(site.shape) == 3 and site.shape[0] == 1 else VECTOR
    one_axis = max(site.shape) == site.parameter.numel()
    return VECTOR if one_axis or _VECTOR_NAMES.fullmatch(site.leaf) else None


_RULES: tuple[Callable[[Site], Reading | None], ...] = (
    _single_axis,
    _parametrized,
    _convolution,
    _adapter,
    _embedding,
    _linear,
    _norm,
    _router,
    expert_reading,
    known_parameter,
    _by_name,
)
