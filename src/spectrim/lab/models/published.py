"""Shapes of published models by name, as settings of transformers, for plans at scale.

The shapes are those of the models' public configurations. Positions and tokens of special meaning, which shape no
parameter, are left at the defaults of transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["PUBLISHED", "Published"]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published shape: the model type of transformers, its architecture, and the settings that shape parameters."""

    model_type: str
    architecture: str
    settings: Mapping[str, Any]


PUBLISHED = {
    "llama3-8b": Published(
        model_type="llama",
        architecture="LlamaForCausalLM",
        settings={
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
    "llama3-70b": Published(
        model_type="llama",
        architecture="LlamaForCausalLM",
        settings={
            "vocab_size": 128_256,
            "hidden_size": 8192,
            "intermediate_size": 28_672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
    ),
    # DeepSeek-V3's architecture in the shape of Kimi K2: 384 experts a layer, of which a token takes eight.
    "moe-1t": Published(
        model_type="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        settings={
            "vocab_size": 163_840,
            "hidden_size": 7168,
            "intermediate_size": 18_432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "first_k_dense_replace": 1,
            "num_attention_heads": 64,
            "num_key_value_heads": 64,
            "n_routed_experts": 384,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
    ),
}
"""Models by the name that ``spectrim plan --model`` takes."""
