"""Fused and unusual parameters of known models, recognised by the class names of their modules.

A layer that computes several projections at once is split into one matrix for each, whether the rows of a projection
are contiguous or alternate with the others'. Every entry was checked against the model's forward pass. Layers that were
not checked are read as one matrix: CodeGen, DeBERTa, MiniMax's lightning attention, Qwen3-Next's in_proj_qkvz, Zamba's
in_proj, gated query projections (Qwen3-Next, Qwen3.5).

Only class names are compared, so that no model library is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn

from spectrim.optim.grouping.layout import INTERLEAVED, Layout, sizes_of
from spectrim.optim.grouping.roles import Reading, Site, class_names

__all__ = ["expert_reading", "fused_sizes", "known_parameter"]

#: A split: see :func:`spectrim.optim.grouping.layout.matrices`.
Sizes = tuple[int | str, ...]
SizeRule = Callable[[nn.Module, int], Sizes | None]


def fused_sizes(site: Site, outputs: int) -> Sizes | None:
    """The sizes of the projections that a known model fuses in this layer, or None if it is one projection."""
    if site.around is None:
        return None
    for class_patterns, attributes, rule in _FUSED_LAYERS:
        if site.attribute in attributes.split() and _any_matches(class_names(site.around), class_patterns):
            # Size 0 means that the model lacks this projection, such as rotary keys without rotary positions.
            split = tuple(size for size in rule(site.around, outputs) or () if size)
            sizes, interleaved = sizes_of(split)
            whole = outputs % sum(sizes) == 0 if interleaved and sizes else sum(sizes) == outputs
            return split if len(sizes) > 1 and whole else None
    return None


def expert_reading(site: Site) -> Reading | None:
    """The reading of experts' weights that form one 3-D parameter, in classes named "...Experts"."""
    if len(site.shape) != 3 or site.leaf not in _EXPERT_WEIGHTS or not _any_matches(site.kinds, "*Experts"):
        return None
    transposed = getattr(site.holder, "is_transposed", not _TRANSPOSED_EXPERTS.isdisjoint(site.kinds))
    outputs = site.shape[2] if transposed else site.shape[1]
    sizes = fused_sizes(site, outputs)
    if site.leaf == "gate_up_proj":
        sizes = _halves(site.holder, outputs) if getattr(site.holder, "is_concatenated", True) else _ALTERNATING
    if site.leaf in ("mlp1_weight", "mlp1_weight_EGD"):
        sizes = _ALTERNATING
    return Reading("matrix", "transposed_stack" if transposed else "stack", sizes)


def known_parameter(site: Site) -> Reading | None:
    """The reading of a weight that a known module holds directly instead of in a linear layer."""
    for class_pattern, leaf_pattern, layout, rule in _PARAMETERS:
        if _any_matches(site.kinds, class_pattern) and fnmatchcase(site.leaf, leaf_pattern):
            return Reading("matrix", layout, rule(site.holder, site.shape[0]) if rule else None)
    return None


def _any_matches(names: Iterable[str], patterns: str) -> bool:
    """True if any of the names matches any of the patterns, which spaces separate."""
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns.split())


def _equal(parts: int) -> SizeRule:
    """Split into this number of equal parts."""
    return lambda module, outputs: None if outputs % parts else (outputs // parts,) * parts


def _named(*attributes: str) -> SizeRule:
    """One part for each of these attributes of the module, which hold the sizes."""

    def sizes(module: nn.Module, outputs: int) -> Sizes | None:
        found = [getattr(module, attribute, None) for attribute in attributes]
        return tuple(size for size in found if isinstance(size, int)) if None not in found else None

    return sizes


def _chunks_of(attribute: str) -> SizeRule:
    """Equal parts, whose size is an attribute of the module."""

    def sizes(module: nn.Module, outputs: int) -> Sizes | None:
        size = getattr(module, attribute, None)
        return (size,) * (outputs // size) if isinstance(size, int) and size > 0 else None

    return sizes


def _in_turns(*attributes: str) -> SizeRule:
    """The parts of one head, each of the size that an attribute of the module has, then those of the next head."""

    named = _named(*attributes)
    return lambda module, outputs: (INTERLEAVED, *found) if (found := named(module, outputs)) else None


def _per_head(width: str) -> SizeRule:
    """Query, key and value of the first head, then of the next; an attribute of the module holds their width."""
    return _in_turns(width, width, width)


def _per_group(module: nn.Module, outputs: int) -> Sizes | None:
    """torchtitan's order: in every group, the queries that share a key and value, then this key and value."""
    queries, width = getattr(module, "heads_per_kv", 0), getattr(module, "head_dim", 0)
    return (INTERLEAVED, queries * width, width, width) if queries * width else None


def _grouped_queries(module: nn.Module, outputs: int) -> Sizes | None:
    """The queries of all heads, then the keys and the values of the key-value heads."""
    config = getattr(module, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        return None
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = outputs // (heads + 2 * groups)
    return heads * width, groups * width, groups * width


def _multi_query(module: nn.Module, outputs: int) -> Sizes | None:
    """The queries of all heads, then one key and one value; interleaved in other forms of Falcon and BigCode."""
    width = getattr(module, "head_dim", 0)
    if getattr(module, "new_decoder_architecture", False):
        groups = getattr(module, "num_kv_heads", 0)
        queries = getattr(module, "num_heads", 0) // groups if groups else 0
        return (INTERLEAVED, queries * width, width, width) if queries * width else None
    if not getattr(module, "multi_query", False):
        return _per_head("head_dim")(module, outputs)
    return outputs - 2 * width, width, width


def _dbrx_attention(module: nn.Module, outputs: int) -> Sizes | None:
    groups = getattr(module, "num_key_value_heads", 0) * getattr(module, "head_dim", 0)
    return outputs - 2 * groups, groups, groups


def _mamba2_input(module: nn.Module, outputs: int) -> Sizes | None:
    """Gate, input, B, C and time step of Mamba-2."""
    width, heads = getattr(module, "intermediate_size", 0), getattr(module, "num_heads", 0)
    states = getattr(module, "n_groups", 0) * getattr(module, "ssm_state_size", 0)
    return width, width, states, states, heads


_halves, _thirds, _quarters = _equal(2), _equal(3), _equal(4)
#: Gate and up projections whose outputs alternate.
_ALTERNATING = (INTERLEAVED, 1, 1)
_mamba_states = _named("time_step_rank", "ssm_state_size", "ssm_state_size")

# (classes around the layer, the layer's names in it, sizes along its outputs); the first match decides.
_FUSED_LAYERS: tuple[tuple[str, str, SizeRule], ...] = (
    # Queries, keys and values. Cross-attention of the GPT-2 family stores two parts, without the queries. "Attention"
    # is that of openai-gpt, "CausalSelfAttention" nanoGPT's.
    ("GPT2Attention DecisionTransformerGPT2Attention ImageGPTAttention Attention", "c_attn", _chunks_of("split_size")),
    ("CausalSelfAttention", "c_attn", _chunks_of("n_embd")),
    ("GPTBigCodeAttention", "c_attn", _multi_query),
    ("FalconAttention", "query_key_value", _multi_query),
    ("GPTNeoXAttention", "query_key_value", _per_head("head_size")),
    ("BloomAttention PersimmonAttention", "query_key_value", _per_head("head_dim")),
    ("FusedQKVLinear", "wqkv", _per_group),  # torchtitan
    ("Phi3Attention Phi4MultimodalAttention", "qkv_proj", _grouped_queries),
    ("DbrxAttention", "Wqkv", _dbrx_attention),
    ("MptAttention ModernBertAttention", "Wqkv", _thirds),
    ("LayoutLMv2SelfAttention", "qkv_linear", _thirds),
    ("Exaone4_5_VisionAttention", "qkv", _named("q_dim", "kv_dim", "kv_dim")),
    # Qwen-VL, GLM-V, SAM and others that follow them.
    ("*Vision*Attention *Blip*Attention HieraMaskUnitAttention MgpstrAttention PPOCR*Attention", "qkv", _thirds),
    ("Sam2MultiScaleAttention SegGptAttention TimesformerSelfAttention VitDetAttention", "qkv", _thirds),
    ("JetMoeAttention", "kv_proj", _halves),
    ("GraniteSpeech*Attention EvollaSequenceCompressorAttention", "to_kv", _halves),
    # Multi-head latent attention: the compressed keys and values, then the shared rotary key. torchtitan's names are
    # the second ones.
    ("*", "kv_a_proj_with_mqa wkv_a", _named("kv_lora_rank", "qk_rope_head_dim")),
    # ... and what keys and values are made of from these, head by head.
    ("*", "kv_b_proj wkv_b", _in_turns("qk_nope_head_dim", "v_head_dim")),
    # Gate and up projections.
    ("*MLP EsmFold2SwiGLU", "gate_up_proj", _halves),
    ("GraniteMoe*MLP JetMoeMoE", "input_linear", _halves),
    ("ModernBert*MLP", "Wi", _halves),
    # State-space models, gated convolutions and linear attention.
    ("MambaMixer FalconMambaMixer JambaMambaMixer", "in_proj", _halves),
    ("MambaMixer FalconMambaMixer JambaMambaMixer", "x_proj", _mamba_states),
    ("Mamba2Mixer BambaMixer FalconH1Mixer GraniteMoeHybridMambaLayer", "in_proj", _mamba2_input),
    ("NemotronHMamba2Mixer Zamba2MambaMixer", "in_proj", _mamba2_input),
    ("Lfm*ShortConv", "in_proj", _thirds),
    ("*GatedDeltaNet", "in_proj_qkv", _named("key_dim", "key_dim", "value_dim")),
)

# (class of the holder, the parameter's name, layout, sizes along its outputs)
_PARAMETERS: tuple[tuple[str, str, Layout, SizeRule | None], ...] = (
    ("MultiheadAttention", "in_proj_weight", "matrix", _thirds),
    ("MultiheadAttention", "[qkv]_proj_weight", "matrix", None),
    ("LSTM", "weight_hr_l*", "matrix", None),
    ("LSTM*", "weight_[ih]h*", "matrix", _quarters),
    ("GRU*", "weight_[ih]h*", "matrix", _thirds),
    ("RNN*", "weight_[ih]h*", "matrix", None),
    ("*MultiModalProjector", "mm_input_projection_weight", "transposed", None),  # Gemma 3
    ("*HyperConnection", "fn", "matrix", None),  # DeepSeek-V4
    ("*HyperHead", "hc_fn", "matrix", None),
    ("Glm5NextTextIndexer", "index_kpool_compress_gate", "matrix", None),
    ("Inkling*RelativeLogits", "proj", "transposed", None),
    ("RecurrentGemmaRglru", "*_gate_weight", "transposed_stack", None),
    ("ZambaMambaMixer", "*_proj_weight", "stack", None),
)

# torchtitan's names end in their axes: experts (E), hidden features (F), model features (D).
_EXPERT_WEIGHTS = frozenset(
    {
        *("gate_up_proj", "gate_proj", "up_proj", "down_proj", "weight"),
        *("w1", "w2", "w3", "w1_EFD", "w2_EDF", "w3_EFD"),
        # torchtitan's GPT-OSS, whose first layer alternates between gate and up.
        *("mlp1_weight", "mlp2_weight", "mlp1_weight_EGD", "mlp2_weight_EDF"),
    }
)
# Experts stored as inputs x outputs, without an attribute is_transposed.
_TRANSPOSED_EXPERTS = frozenset({"Llama4TextExperts"})
