"""Stacks of gradients whose mean and noise are known, and a random basis."""

import torch
from torch import Tensor


def basis(size: int, rank: int, seed: int) -> Tensor:
    """Orthonormal columns, drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64)).Q


def low_rank(U: Tensor, V: Tensor, values: list[float]) -> Tensor:
    """Σ σᵢ uᵢ vᵢᵀ."""
    return (U[:, : len(values)] * torch.tensor(values, dtype=torch.float64)) @ V[:, : len(values)].mT


def gaussian(*shape: int, seed: int) -> Tensor:
    """Independent entries of variance 1."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
