"""spectrim: spectral control of LLM training.

Optimizers that clip, flatten or reshape the singular values of gradients and updates, and the operators they are
made of. Importing this package needs torch alone.
"""

from spectrim.monitor import SpectralMonitor
from spectrim.operators import (
    Spike,
    bayes_shrink,
    entry_scale,
    hard_clip,
    orthogonalize,
    shape_spike,
    smooth_shrink,
    soft_clip,
    track_spike,
)
from spectrim.optim import (
    AdamW,
    AdEMAMix,
    Momentum,
    Muon,
    Signum,
    Spectra,
    SpectralClipping,
    SpectralOptimizer,
    clip_grad_spectral_,
    create,
    describe,
    param_groups,
    set_step_memory,
    shrink_grad_,
)
from spectrim.optim.names import recipes

__version__ = "0.1.0"

__all__ = [
    "AdEMAMix",
    "AdamW",
    "Momentum",
    "Muon",
    "Signum",
    "Spectra",
    "SpectralClipping",
    "SpectralMonitor",
    "SpectralOptimizer",
    "Spike",
    "bayes_shrink",
    "clip_grad_spectral_",
    "create",
    "describe",
    "entry_scale",
    "hard_clip",
    "orthogonalize",
    "param_groups",
    "recipes",
    "set_step_memory",
    "shape_spike",
    "shrink_grad_",
    "smooth_shrink",
    "soft_clip",
    "track_spike",
]
