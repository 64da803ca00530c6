"""Pure functions of stacks of matrices (..., m, n): no state, no optimizer, no process group."""

from .bounds import entry_bound, frobenius_bound, spectral_norm_bound, sum_bound
from .clip import hard_clip, soft_clip, soft_clip_vector
from .inverse_root import Solver, choose_solver
from .orthogonalize import PolarSolver, orthogonalize
from .shrink import DEFAULT_SHRINK_FACTOR, DEFAULT_SHRINK_FORM, ShrinkForm, bayes_shrink, entry_scale, smooth_shrink
from .spike import Spike, SpikeCorrection, shape_spike, spike_correction, track_spike

__all__ = [
    "DEFAULT_SHRINK_FACTOR",
    "DEFAULT_SHRINK_FORM",
    "PolarSolver",
    "ShrinkForm",
    "Solver",
    "Spike",
    "SpikeCorrection",
    "bayes_shrink",
    "choose_solver",
    "entry_bound",
    "entry_scale",
    "frobenius_bound",
    "hard_clip",
    "orthogonalize",
    "shape_spike",
    "smooth_shrink",
    "soft_clip",
    "soft_clip_vector",
    "spectral_norm_bound",
    "spike_correction",
    "sum_bound",
    "track_spike",
]
