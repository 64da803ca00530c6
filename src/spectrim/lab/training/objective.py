"""The training objective: cross-entropy of the next token, in the configured precision."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["language_loss", "next_token_logits"]


def next_token_logits(model: nn.Module, inputs: Tensor, precision: str) -> Tensor:
    """Logits in float32, (batch x sequence, vocabulary); with precision "bf16" the model runs in bfloat16 autocast."""
    with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"), plain_rows():
        logits: Tensor = model(input_ids=inputs).logits
    return logits.float().flatten(0, 1)


def language_loss(model: nn.Module, inputs: Tensor, targets: Tensor, precision: str = "float32") -> Tensor:
    """Mean cross-entropy of the next token, in float32."""
    return functional.cross_entropy(next_token_logits(model, inputs, precision), targets.flatten())


@contextmanager
def plain_rows() -> Iterator[None]:
    """Skip transformers' search for several sequences in a row. The search makes a step wait for the device; compiled,
    it builds a mask in place of plain causal attention.
    """
    masking = sys.modules.get("transformers.masking_utils")
    ask = getattr(masking, "find_packed_sequence_indices", None)
    if masking is None or ask is None:
        yield
        return
    setattr(masking, "find_packed_sequence_indices", never_packed)  # noqa: B010 - not known to a type checker
    try:
        yield
    finally:
        setattr(masking, "find_packed_sequence_indices", ask)  # noqa: B010


def never_packed(position_ids: Tensor) -> None:
    """Stands in for the search; None means that every row is one sequence."""
