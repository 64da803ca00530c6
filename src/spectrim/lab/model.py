"""Models: a preset's transformers configuration, initialised from a seed.

The global random state is left as it was. Nothing here touches the network.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectrim.lab.errors import LabError
from spectrim.lab.tokens import END_OF_DOCUMENT, Tokens

__all__ = ["PRESETS", "Preset", "build_model", "check_preset", "save_model"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The shape of a Llama-like model; heads are 64 wide, but for the tiny one."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int


PRESETS = {
    "tiny": Preset(hidden_size=32, intermediate_size=64, layers=1, heads=1),
    "1m": Preset(hidden_size=128, intermediate_size=384, layers=3, heads=2),
    "2m": Preset(hidden_size=192, intermediate_size=512, layers=4, heads=3),
    "10m": Preset(hidden_size=384, intermediate_size=1024, layers=6, heads=6),
    "25m": Preset(hidden_size=512, intermediate_size=1408, layers=8, heads=8),
    "90m": Preset(hidden_size=768, intermediate_size=2048, layers=12, heads=12),
}


def check_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        LabError: there is none.
    """
    if name not in PRESETS:
        raise LabError(f"unknown preset {name!r}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def quiet_transformers() -> Any:
    """The transformers package, kept from the network and from printing."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def build_model(preset: str, *, vocabulary_size: int, sequence_length: int, seed: int) -> nn.Module:
    """A ``LlamaForCausalLM`` of the preset's shape, its weights drawn from the seed; the head is not tied."""
    shape = check_preset(preset)
    transformers = quiet_transformers()
    config = transformers.LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=sequence_length,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        use_cache=False,
        bos_token_id=0,  # the only special token, END_OF_DOCUMENT
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def save_model(model: Any, tokens: Tokens, folder: Path) -> None:
    """Write a Hugging Face folder: weights in safetensors, configuration and tokenizer."""
    transformers = quiet_transformers()
    model.save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokens.tokenizer_file),
        bos_token=END_OF_DOCUMENT,
        eos_token=END_OF_DOCUMENT,
        model_max_length=model.config.max_position_embeddings,
    )
    tokenizer.save_pretrained(folder)
