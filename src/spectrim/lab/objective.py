"""What a model is trained for: the next token, by cross-entropy, in the arithmetic that the configuration asks for."""

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["language_loss", "next_token_logits"]


def next_token_logits(model: nn.Module, inputs: Tensor, precision: str) -> Tensor:
    """Logits in float32, (batch x sequence, vocabulary); with precision "bf16" the model runs in bfloat16 autocast."""
    with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        logits: Tensor = model(input_ids=inputs).logits
    return logits.float().flatten(0, 1)


def language_loss(model: nn.Module, inputs: Tensor, targets: Tensor, precision: str = "float32") -> Tensor:
    """Mean cross-entropy of the next token, in float32."""
    return functional.cross_entropy(next_token_logits(model, inputs, precision), targets.flatten())
