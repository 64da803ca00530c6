"""The optimizers, the wrapper around other optimizers, param groups, and functions on gradients."""

from spectrim.optim.describe import describe
from spectrim.optim.gradients.in_place import clip_grad_spectral_, shrink_grad_
from spectrim.optim.grouping.groups import param_groups
from spectrim.optim.memory import set_step_memory
from spectrim.optim.optimizer import SpectralOptimizer
from spectrim.optim.recipe_names import create
from spectrim.optim.recipes import MARS, AdamW, AdEMAMix, Momentum, Muon, Signum, Spectra
from spectrim.optim.rules.rule import Recipe
from spectrim.optim.wrapping.wrapper import SpectralClipping

__all__ = [
    "MARS",
    "AdEMAMix",
    "AdamW",
    "Momentum",
    "Muon",
    "Recipe",
    "Signum",
    "Spectra",
    "SpectralClipping",
    "SpectralOptimizer",
    "clip_grad_spectral_",
    "create",
    "describe",
    "param_groups",
    "set_step_memory",
    "shrink_grad_",
]
