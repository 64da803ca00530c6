"""spectrim: spectral control of LLM training.

Optimizers that clip, flatten or reshape the singular values of gradients and updates, and the operators they are
made of. The package needs torch alone, and imports each name at its first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
        MARS,
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
    from spectrim.optim.recipe_names import recipes

__version__ = "0.2.0"

_PACKAGES = ("distributed", "kernels", "monitor", "operators", "optim")
_OPERATORS = (
    *("Spike", "bayes_shrink", "entry_scale", "hard_clip", "orthogonalize", "shape_spike", "smooth_shrink"),
    *("soft_clip", "track_spike"),
)
#: Where names are; all others are in ``spectrim.optim``.
_HOMES = {
    "SpectralMonitor": "spectrim.monitor",
    "recipes": "spectrim.optim.recipe_names",
    **dict.fromkeys(_OPERATORS, "spectrim.operators"),
}

__all__ = [
    "MARS",
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


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"spectrim.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_HOMES.get(name, "spectrim.optim")), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
