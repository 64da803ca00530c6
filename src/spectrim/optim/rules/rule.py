"""The rule of one step for the parameters of one group and role.

:func:`rule_of` reads a group's options into a :class:`Rule`, which the step, ``describe``, the planner and the monitor
use instead of the group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectrim.operators import DEFAULT_SHRINK_FACTOR, ShrinkForm
from spectrim.optim.directions import Adam, Direction, Given
from spectrim.optim.grouping.options import Scale, is_zero
from spectrim.optim.rules.schedule import clip_threshold, number_if_free, pre_clip_threshold
from spectrim.optim.spectral.base import SpectralOperator
from spectrim.optim.spectral.clip import CLIPS, SoftClip

__all__ = ["Applied", "Recipe", "Rule", "Shrink", "in_scope", "rule_of", "state_dtype_of"]

#: Roles that are not shrunk. Their rows belong to tokens, whose frequencies differ by orders of magnitude, so rows of
#: frequent tokens would count as outliers.
UNSHRUNK_ROLES = ("embedding", "head")


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


class Shrink(NamedTuple):
    """Entry-wise shrinkage: the factor on the entry scale, the form, and "gradient" or "direction"."""

    factor: float
    form: ShrinkForm
    at: str


class Applied(NamedTuple):
    """Learning rate, weight decay and clip threshold of a parameter's next step, for ``describe``."""

    lr: float
    weight_decay: float
    threshold: float | None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The step of the parameters of one group and role. Attributes are in the order in which the step applies them.

    Attributes:
        maximize: negate the gradient.
        shrink: shrink large entries of the gradient or of the direction; None to leave them.
        pre_clip: threshold on the gradient's singular values, or None.
        direction: the base direction; by default one that something else computes.
        narrow_state: keep state in bfloat16.
        operator: changes the direction's singular values, or None.
        scale: how the operator's result is scaled.
        clip: the operator that clips the scaled result to ``threshold``, or None. The clipped result is multiplied by
            √max(1, m/n).
        lr, weight_decay: X ← (1 − lr · weight_decay) X − lr · U for the result U.
        vector: the parameters are not matrices.
        first: the group has taken no step yet.
        exchange: dtype in which sharded matrices are sent, or None for that of the direction.
        raises: a non-finite gradient is an error.
        structure: equal for rules whose parameters may share a stack: all values but learning rate and decay.
        one_pass: the numbers of a rule that AdamW's kernel can do in one pass; None for other rules.
    """

    vector: bool
    group: int = 0
    direction: Direction = field(default_factory=Given)
    operator: SpectralOperator | None = None
    scale: Scale = "none"
    clip: SpectralOperator | None = None
    threshold: float | Tensor | None = None
    pre_clip: float | Tensor | None = None
    pre_clipper: SpectralOperator = field(default_factory=SoftClip)
    shrink: Shrink | None = None
    lr: float | Tensor = 1.0
    weight_decay: float = 0.0
    maximize: bool = False
    narrow_state: bool = False
    first: bool = False
    exchange: torch.dtype | None = None
    raises: bool = False
    steps_taken: int = 0
    structure: tuple[Any, ...] = field(init=False, repr=False)
    one_pass: tuple[Any, ...] | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Thresholds on the device cannot be compared, so each group with one has its own key.
        structure = (
            self.direction,
            self.operator,
            self.clip,
            ("group", self.group) if isinstance(self.threshold, Tensor) else self.threshold,
            self.scale,
            ("group", self.group) if isinstance(self.pre_clip, Tensor) else self.pre_clip,
            self.shrink,
            self.vector,
            self.maximize,
            self.narrow_state,
            self.first,
            str(self.exchange),
            self.still,
        )
        in_one_pass = self.is_adamw and not self.maximize
        object.__setattr__(self, "structure", structure)
        object.__setattr__(self, "one_pass", (self.direction, self.shrink) if in_one_pass else None)

    @property
    def is_adamw(self) -> bool:
        """True if the step is torch's AdamW, except that entries of the gradient may be shrunk."""
        plain = self.operator is None and self.clip is None and self.pre_clip is None and self.scale == "none"
        plain = plain and self.shrink_direction is None and not self.narrow_state
        return plain and isinstance(self.direction, Adam) and not self.direction.corrects

    @property
    def shrink_gradient(self) -> Shrink | None:
        """How entries of the gradient are shrunk."""
        return self.shrink if self.shrink is not None and self.shrink.at == "gradient" else None

    @property
    def shrink_direction(self) -> Shrink | None:
        """How entries of the direction are shrunk."""
        return self.shrink if self.shrink is not None and self.shrink.at == "direction" else None

    @property
    def is_dense(self) -> bool:
        """True if the step needs whole matrices, which must be gathered if they are sharded."""
        gathers = self.operator is not None and self.operator.gathers
        return not self.vector and (gathers or self.clip is not None or self.pre_clip is not None)

    @property
    def still(self) -> bool:
        """True if the learning rate is known to be zero, so that the step only updates state."""
        return is_zero(self.lr)

    @property
    def applied(self) -> Applied:
        """Learning rate, decay and threshold as plain numbers; reads the device if they are tensors."""
        threshold = None if self.threshold is None or self.clip is None else float(self.threshold)
        return Applied(float(self.lr), self.weight_decay, threshold)

    @property
    def label(self) -> str:
        """The rule in a few words."""
        if self.is_adamw and self.shrink is None:
            return "adamw"
        words = [self.direction.name]
        if self.pre_clip is not None:
            words.insert(0, "pre-clip")
        if self.shrink is not None:
            words.insert(0 if self.shrink.at == "gradient" else len(words), "shrink")
        if self.operator is not None:
            words.append(self.operator.label)
        if self.clip is not None:
            words.append(f"{self.clip.label} norm" if self.vector else self.clip.label)
        return " → ".join(words)


def rule_of(
    group: Mapping[str, Any],
    recipe: Recipe,
    role: str,
    *,
    vector: bool,
    index: int = 0,
    steps: int | Tensor | None = None,
) -> Rule:
    """Read a group's options into the rule for parameters of one role.

    Roles outside ``clip_scope`` get plain AdamW. A tensor learning rate stays a tensor if reading it would block or a
    compiler traces the step.

    Args:
        group: a param group.
        recipe: the optimizer's.
        vector: the parameters are not matrices.
        index: the group's index, part of :attr:`Rule.structure`.
        steps: the group's steps so far, if the device counts them; see :func:`~.schedule.clip_threshold`.
    """
    follows = in_scope(group, role)
    taken = recipe if follows else PLAIN_ADAMW
    lr = number_if_free(group["lr"])
    shrinks = follows and group["shrink"] is not None and role not in UNSHRUNK_ROLES
    factor = DEFAULT_SHRINK_FACTOR if group["shrink"] == "auto" else group["shrink"]
    clips = follows and group["clip"] is not None
    known = {**group, "lr": lr}
    direction = taken.vectors if vector and taken.vectors is not None else taken.direction
    rule = Rule(
        direction=direction.of(group),
        operator=None if taken.operator is None or vector else taken.operator.of(group),
        scale=group["scale"] if follows and not vector else "none",
        clip=CLIPS[group["clip_form"]].of(group) if clips else None,
        threshold=clip_threshold(known, steps) if clips else None,
        pre_clip=pre_clip_threshold(known, steps) if follows and not vector else None,
        pre_clipper=SoftClip.of(group),
        shrink=Shrink(factor, group["shrink_form"], group["shrink_at"]) if shrinks else None,
        lr=lr,
        weight_decay=float(group["weight_decay"]),
        vector=vector,
        maximize=group["maximize"],
        narrow_state=group["state_dtype"] == "bfloat16",
        first=group["steps_taken"] == 0,
        exchange=torch.bfloat16 if group["exchange_dtype"] == "bfloat16" else None,
        raises=group["on_nonfinite"] == "raise",
        group=index,
        steps_taken=group["steps_taken"],
    )
    return rule if not vector else _without_decay(rule, group, recipe)


def in_scope(group: Mapping[str, Any], role: str) -> bool:
    """True if parameters of a role follow the recipe and are clipped."""
    return bool(group["clip_scope"] == "all" or role == "matrix")


def state_dtype_of(rule: Rule, parameter: Tensor) -> torch.dtype:
    """The dtype of a parameter's state: float32, float64 for a float64 parameter, or bfloat16 if asked for."""
    return torch.bfloat16 if rule.narrow_state else torch.promote_types(parameter.dtype, torch.float32)


def _without_decay(rule: Rule, group: Mapping[str, Any], recipe: Recipe) -> Rule:
    """The rule without weight decay, unless the vectors' group states one.

    A plain list of parameters given to AdamW without any option also decays vectors, as torch's AdamW does."""
    torch_like = group.get("role") is None and recipe.direction is Adam and rule.is_adamw and rule.shrink is None
    return rule if torch_like or group["decays_vectors"] else replace(rule, weight_decay=0.0)
