"""A language model of 34 M parameters as people train them: RMSNorm, rotary positions, SwiGLU; plain torch.

Width 512, 8 layers, vocabulary 8,192, 32 sequences of 512 tokens a step; forward and backward in bfloat16 by autocast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gpu.device import Device

__all__ = ["Language", "Sizes", "loss_of"]


@dataclass(frozen=True)
class Sizes:
    """Of a model and of a step's batch."""

    width: int = 512
    layers: int = 8
    heads: int = 8
    inner: int = 1408
    vocabulary: int = 8192
    length: int = 512
    batch: int = 32

    @classmethod
    def of(cls, device: Device) -> Sizes:
        """The full sizes, or some for a rehearsal."""
        return cls(64, 2, 2, 128, 512, 32, 4) if device.small else cls()

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.length * self.batch


class Block(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, inner = sizes.width, sizes.inner
        self.heads = sizes.heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, length, width) to the same."""
        batch, length, width = x.shape
        y = self.attention_norm(x)
        q, k, v = (
            project(y).view(batch, length, self.heads, -1).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (z * cos + torch.cat((-z.chunk(2, -1)[1], z.chunk(2, -1)[0]), -1) * sin for z in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(y.transpose(1, 2).reshape(batch, length, width))
        y = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class Language(nn.Module):
    """The mean loss of predicting every next token."""

    cos: Tensor
    sin: Tensor

    def __init__(self, sizes: Sizes, seed: int = 0) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(sizes.vocabulary, sizes.width)
        self.layers = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.width)
        self.lm_head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)
        size = sizes.width // sizes.heads
        angles = torch.outer(torch.arange(sizes.length).float(), 1e4 ** -(torch.arange(0, size, 2) / size)).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        generator = torch.Generator().manual_seed(seed)
        for name, param in self.named_parameters():
            if param.ndim == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(param, std=0.02 / (math.sqrt(2 * sizes.layers) if last else 1), generator=generator)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of (batch, length) tokens."""
        x = self.embed_tokens(inputs)
        for block in self.layers:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.lm_head(self.norm(x)).float().flatten(0, 1), targets.flatten())


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The loss in bfloat16, by autocast."""
    with torch.autocast(inputs.device.type, dtype=torch.bfloat16):
        loss: Tensor = model(inputs, targets)
    return loss
