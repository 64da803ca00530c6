"""What a recipe is: a direction and an operator on its spectrum, as data.

The pipeline that every recipe runs through is in :mod:`spectrim.optim.optimizer`; the named recipes are in
:mod:`spectrim.optim.recipes`.
"""

from __future__ import annotations

from dataclasses import dataclass

from spectrim.optim.directions import Adam, Direction
from spectrim.optim.spectral.base import SpectralOperator

__all__ = ["PLAIN_ADAMW", "Recipe"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One optimizer, as data. Shrinking, pre-clipping and clipping are options of every recipe, and so is its scale.

    Attributes:
        direction: what would be subtracted without spectral control.
        operator: what is done to the direction's singular values before any clipping.
    """

    direction: type[Direction]
    operator: type[SpectralOperator] | None = None

    @property
    def name(self) -> str:
        """Direction and operator in words; state of one recipe does not fit another."""
        return self.direction.name if self.operator is None else f"{self.direction.name} → {self.operator.label}"


#: The rule for everything that a recipe leaves alone: embeddings, heads and vectors of Muon and Spectra.
PLAIN_ADAMW = Recipe(direction=Adam)
