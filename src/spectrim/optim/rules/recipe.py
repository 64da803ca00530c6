"""Recipes: a base direction and a spectral operator. :mod:`spectrim.optim.recipes` has the named optimizers."""

from __future__ import annotations

from dataclasses import dataclass

from spectrim.optim.directions import Adam, Direction
from spectrim.optim.spectral.base import SpectralOperator

__all__ = ["PLAIN_ADAMW", "Recipe"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An optimizer as data. Shrinking, pre-clipping, clipping and scale are options of every recipe.

    Attributes:
        direction: the base direction, which plain optimizers subtract.
        operator: changes the direction's singular values, before any clipping.
        vectors: the base direction of vectors, if it is another one.
    """

    direction: type[Direction]
    operator: type[SpectralOperator] | None = None
    vectors: type[Direction] | None = None

    @property
    def name(self) -> str:
        """Direction and operator in words. A state dict stores it, so that another recipe refuses the state."""
        return self.direction.name if self.operator is None else f"{self.direction.name} → {self.operator.label}"


#: The recipe for the embeddings, heads and vectors of Muon and Spectra.
PLAIN_ADAMW = Recipe(direction=Adam)
