"""Builds models from a seed or from a folder of weights, and exports them as Hugging Face folders. Keeps the global
random state, and never uses the network.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectrim.lab.config import ModelConfig
from spectrim.lab.data.tokens import Tokens
from spectrim.lab.errors import LabError
from spectrim.lab.huggingface import quiet_transformers
from spectrim.lab.models.architecture import causal_configuration

__all__ = ["build_model", "save_model"]


def build_model(
    model: ModelConfig | str,
    *,
    vocabulary_size: int,
    sequence_length: int,
    seed: int,
    end_of_document: int | None = 0,
    padded: bool = True,
) -> nn.Module:
    """A causal language model in float32: its weights drawn from the seed, or read from a folder.

    Args:
        model: what to build, or just a preset's name.
        vocabulary_size: of the tokenizer. A preset or model type gets this size; a file or weights must have it, or
            more.
        sequence_length: the longest sequence that the model has to process.
        seed: decides the weights unless they are read.
        end_of_document: the token that ends a text, for models drawn from a seed.
        padded: True if the model's vocabulary may be larger than the tokenizer's, as in many published models.

    Raises:
        LabError: vocabulary or sequence do not fit the model, or the folder's weights are not this model's.
    """
    model = model if isinstance(model, ModelConfig) else ModelConfig(preset=model)
    transformers = quiet_transformers()
    config = causal_configuration(model, vocabulary_size=vocabulary_size, sequence_length=sequence_length)
    name = model.weights or model.architecture or model.preset
    check_fit(config, f"model {name!r}", vocabulary_size, sequence_length, padded=padded)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if model.weights is not None:
            return read_weights(Path(model.weights), config)
        config.bos_token_id = config.eos_token_id = end_of_document
        # A padding token's row would not be trained, and the lab's text has no padding.
        config.pad_token_id = None
        try:
            built: nn.Module = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
        except Exception as error:
            # A model's constructor may fail in any way on a configuration that does not fit it.
            raise LabError(f"model {name!r} cannot be built: {type(error).__name__}: {error}") from error
    return built


def check_fit(config: Any, place: str, vocabulary_size: int, sequence_length: int, *, padded: bool) -> None:
    own = config.get_text_config().vocab_size
    if own < vocabulary_size or (own > vocabulary_size and not padded):
        raise LabError(
            f"{place} has vocab_size {own}, the tokenizer has {vocabulary_size} tokens; give --vocabulary-size {own}, "
            f"a --tokenizer that fits, or vocab_size = {vocabulary_size} in [model.overrides]"
        )
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions < sequence_length:
        raise LabError(f"{place} has max_position_embeddings {positions}, sequence_length is {sequence_length}")


def read_weights(folder: Path, config: Any) -> nn.Module:
    """Load a Hugging Face folder; a missing tensor is an error, since it would be drawn at random."""
    transformers = quiet_transformers()
    try:
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            # Never run code from the folder.
            trust_remote_code=False,
            weights_only=True,
        )
    except Exception as error:
        # A damaged file may raise any error of its format's reader.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise LabError(f"weights {str(folder)!r} cannot be read: {reason}") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, loaded[kind])):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise LabError(
                f"weights {str(folder)!r} are not those of {type(model).__name__}: {kind[:-5]} {names[0]}{more}"
            )
    built: nn.Module = model.train()
    return built


def save_model(model: Any, tokens: Tokens, folder: Path) -> None:
    """Write a Hugging Face folder: weights in safetensors, configuration and, where there is one, tokenizer."""
    transformers = quiet_transformers()
    model.save_pretrained(folder)
    if tokens.tokenizer is None:
        return
    if tokens.tokenizer.is_dir():
        shutil.copytree(tokens.tokenizer, folder, dirs_exist_ok=True)
        return
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokens.tokenizer),
        bos_token=tokens.end_of_document,
        eos_token=tokens.end_of_document,
        **({} if positions is None else {"model_max_length": positions}),
    )
    tokenizer.save_pretrained(folder)
