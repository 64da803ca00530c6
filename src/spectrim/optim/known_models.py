"""Fused projections of known models, recognised by the class of the module around them.

A linear layer that computes several projections at once is read as one matrix for each. That is only right where the
outputs of a projection lie next to each other, so every entry was checked against the model's forward pass, and
layers that interleave their projections head by head (GPT-NeoX, BLOOM, Persimmon, CodeGen, Falcon's grouped form,
Qwen3-Next's in_proj) are left out: contiguous sizes would cut through every head, so such a layer is read as one
matrix. Relied on by :mod:`reading`.
"""

from __future__ import annotations

from collections.abc import Callable

from .roles import Reading, Site

__all__ = ["expert_reading", "fused_outputs"]

Sizes = tuple[int, ...]


def equal(parts: int) -> Callable[[Site, int], Sizes | None]:
    """Sizes of so many equal parts."""

    def sizes(site: Site, outputs: int) -> Sizes | None:
        return (outputs // parts,) * parts if outputs % parts == 0 else None

    return sizes


def attention_sizes(site: Site, outputs: int) -> Sizes | None:
    """Queries of all heads, then keys, then values of the key-value heads; sizes from the configuration."""
    heads = site.config("num_attention_heads")
    if heads is None:
        return None
    groups = site.config("num_key_value_heads") or heads
    if outputs % (heads + 2 * groups):
        return None
    width = outputs // (heads + 2 * groups)
    return heads * width, groups * width, groups * width


# (class around the layer, the layer's name in it) -> sizes along the layer's outputs
_FUSED: dict[tuple[str, str], Callable[[Site, int], Sizes | None]] = {
    ("GPT2Attention", "c_attn"): equal(3),
    ("Phi3Attention", "qkv_proj"): attention_sizes,
    ("Phi3MLP", "gate_up_proj"): equal(2),
}


def fused_outputs(site: Site, outputs: int) -> Sizes | None:
    """Sizes of the projections that a known model stores in one layer, or None for a layer of one projection."""
    if site.around is None:
        return None
    rule = _FUSED.get((type(site.around).__name__, site.attribute))
    sizes = rule(site, outputs) if rule is not None else None
    return sizes if sizes is not None and sum(sizes) == outputs else None


def expert_reading(site: Site) -> Reading | None:
    """The reading of expert weights held as one 3-D parameter (transformers: classes named "...Experts")."""
    if len(site.shape) != 3 or "Experts" not in site.kind:
        return None
    transposed = bool(getattr(site.holder, "is_transposed", False))
    outputs = site.shape[2] if transposed else site.shape[1]
    halves = site.leaf == "gate_up_proj" and bool(getattr(site.holder, "is_concatenated", True)) and outputs % 2 == 0
    split = (outputs // 2, outputs // 2) if halves else None
    return Reading("matrix", "transposed_stack" if transposed else "stack", split)
