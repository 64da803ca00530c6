"""Optimizers as recipes over the operators, and the groups they read."""

from spectrim.optim.describe import describe
from spectrim.optim.groups import param_groups
from spectrim.optim.optimizer import SpectralOptimizer
from spectrim.optim.recipe import Recipe
from spectrim.optim.recipes import AdamW, AdEMAMix, Momentum, Muon, Signum, Spectra

__all__ = [
    "AdEMAMix",
    "AdamW",
    "Momentum",
    "Muon",
    "Recipe",
    "Signum",
    "Spectra",
    "SpectralOptimizer",
    "describe",
    "param_groups",
]
