"""SpectralClipping: spectral clipping of the updates of any other optimizer.

The base optimizer keeps its groups, state and arithmetic. Its change to the weights, which :mod:`probe` separates from
its decay, is clipped by the same functions as in the library's own recipes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Unpack

import torch
from torch import Tensor
from torch.optim import Optimizer

from spectrim.distributed.dtensor import is_dtensor
from spectrim.optim.grouping.flat_shards import check_group, count_matrices
from spectrim.optim.grouping.options import ClippingOptions, complete_options
from spectrim.optim.optimizer import SpectralOptimizer
from spectrim.optim.rules.rule import Applied, Rule, in_scope
from spectrim.optim.rules.schedule import clip_threshold
from spectrim.optim.screened import Position, ScreenedOptimizer
from spectrim.optim.screening.nonfinite import screen
from spectrim.optim.state.parameter_state import check_parameter
from spectrim.optim.stepping.entries import Entry, role_and_layout
from spectrim.optim.wrapping.base_updates import clip_changes, rule_of_changes
from spectrim.optim.wrapping.clipping_options import ADDED_KEYS, CLIPPING_KEYS, clipping_values
from spectrim.optim.wrapping.probe import StepDecomposition, check_base, find_decomposition
from spectrim.optim.wrapping.probe_shards import trial_of, try_shards
from spectrim.optim.wrapping.wrapped_entry import WrappedEntry, wrapped

__all__ = ["SpectralClipping"]


class SpectralClipping(ScreenedOptimizer):
    r"""Clip the updates of any optimizer spectrally: the base computes the direction U, the wrapper takes the step.

        U ← the base's direction;   X ← keep · X − η √max(1, m/n) H_c(U)       H_c(U) = Σ σ/√(1+σ²/c²) uvᵀ

    keep is the factor of the base's decoupled weight decay, which is not clipped.

    Args:
        optimizer: the base. Use the wrapper to step, save and load from now on. Both share param groups and state, so a
            scheduler may drive either. Groups of :func:`spectrim.param_groups` carry roles and layouts; in plain
            groups, 2-D and 3-D parameters are matrices and all others vectors.
        clip: threshold c of the update's singular values; "auto" is 0.01 divided by the group's peak learning rate,
            None does not clip.
        options: see :class:`.ClippingOptions`. ``clip_scope`` is "all": embeddings and heads are clipped as matrices,
            vectors by their norm; "matrices" does not clip them.

    Raises:
        ValueError: a value is not allowed, or the base cannot be wrapped; the message gives the reason.
        TypeError: a keyword is unknown.

    How it works. A probe at construction measures, for every group, how the base steps (:mod:`.probe`):

    - Its change does not depend on the weights (AdamW, NAdam, Lion, SOAP, ...): the base steps on zero weights, and the
      result is the change, exactly and in any dtype.
    - Its decay is added to the gradient (SGD, RMSprop, Adam with ``weight_decay``): the base steps on zero weights too,
      and the wrapper adds the decay to the gradient during the step. The decay is clipped with the rest of U.
    - Its change depends on the weights (Adafactor, trust ratios): the base steps on the weights, and the change is the
      difference. This needs weights in float32 or wider; others are refused.

    Bases are refused if they need a closure (LBFGS), wrap another optimizer or keep their own copy of the weights; and,
    for sharded parameters, if a trial shows that their step on shards differs from their step on the whole tensor
    (:mod:`.probe_shards`). Construct the wrapper on every rank at the same point.

    Notes. A step holds the weights twice, and the gradient too if decay is added to it. Hooks of the base run, and see
    zero weights. A gradient that is not finite skips the whole step; the flag is read from the device once a step. At
    learning rate 0 nothing moves. The decay of vectors is the base's: set it in the groups.

    Source: arXiv 2603.14315.
    """

    def __init__(
        self, optimizer: Optimizer, clip: float | Literal["auto"] | None = "auto", **options: Unpack[ClippingOptions]
    ) -> None:
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, SpectralOptimizer):
            name = type(optimizer).__name__
            raise TypeError(f"cannot wrap {name}: expected a torch.optim.Optimizer without a clip=... of its own")
        check_base(optimizer)
        own = {"lr": 0.0, "weight_decay": 0.0, "clip_scope": "all", "clip": clip}
        self._clipping = complete_options(own, options, CLIPPING_KEYS)
        self._counts: dict[tuple[int, int], dict[str, Tensor]] = {}
        self._decompositions: dict[tuple[Any, ...], StepDecomposition] = {}
        self._tried: set[tuple[Any, ...]] = set()
        self._begin()
        super().__init__(optimizer.param_groups, dict(optimizer.defaults))
        self.defaults.update({key: self._clipping[key] for key in CLIPPING_KEYS})
        self.base = optimizer
        self._share(optimizer)
        optimizer.register_load_state_dict_post_hook(self._share)

    # -- Groups and state: the base's ----------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base, and complete its clip options."""
        if "base" not in vars(self):
            # Called by torch's constructor, with the groups that the base already has.
            super().add_param_group(param_group)
            return
        self.base.add_param_group(param_group)
        try:
            self._share(self.base)
        except ValueError:
            self.base.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and state as the base does; the hooks of both run."""
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        self.base.load_state_dict(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def rule(self, group: Mapping[str, Any], parameter: Tensor) -> str:
        """A short description of the step of a parameter of this group, for ``describe``."""
        role, layout = role_and_layout(group, parameter)
        name = type(self.base).__name__
        if group.get("weight_decay") and self.decomposition(group, parameter).coupling:
            name += " with decay in its gradient"
        if group["clip"] is None or not in_scope(group, role):
            return name
        return f"{name} → {'clip norm' if layout == 'vector' else 'clip'}"

    def applied(self, group: Mapping[str, Any], parameter: Tensor) -> Applied:
        """Learning rate, decay and clip threshold of a parameter's next step, for ``describe``.

        Decay that the base adds to the gradient is not included, since it is clipped with the gradient.
        """
        role, _ = role_and_layout(group, parameter)
        lr = float(group["lr"])
        limit = clip_threshold({**group, "lr": lr}) if in_scope(group, role) else None
        decomposition = self.decomposition(group, parameter)
        decay = decomposition.decay + (decomposition.fixed_decay / lr if lr else 0.0)
        return Applied(lr, decay, None if limit is None else float(limit))

    def decomposition(self, group: Mapping[str, Any], parameter: Tensor) -> StepDecomposition:
        """How the base steps a parameter of this group."""
        key = (_switches(group), parameter.ndim, parameter.dtype)
        return self._decompositions.get(key) or find_decomposition(self.base, group, parameter.ndim)

    def __getstate__(self) -> dict[str, Any]:
        kept = {"base": self.base, "_clipping": self._clipping, "_counts": self._counts}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()
        self._decompositions, self._tried = {}, set()
        self.__dict__.setdefault("_counts", {})
        self.base.register_load_state_dict_post_hook(self._share)

    def _share(self, base: Optimizer) -> None:
        """Share the base's groups and state, and complete the groups; if one is refused, none is changed."""
        self.param_groups, self.state = base.param_groups, base.state
        for group in self.param_groups:
            if "steps_taken" in group and "lr_factor" not in group and "lr_scale" in group:
                # The old name of lr_factor, from an older checkpoint.
                group["lr_factor"] = group.pop("lr_scale")
        new = [i for i, group in enumerate(self.param_groups) if not all(key in group for key in ADDED_KEYS)]
        values = [clipping_values(base, index, self._clipping) for index in new]
        for index in new:
            group = self.param_groups[index]
            for place, parameter in enumerate(group["params"]):
                name = self._name((index, place))
                if not parameter.is_floating_point():
                    kind = f"{type(parameter).__name__} of {parameter.dtype}"
                    raise ValueError(f"{name} is a {kind}: expected one of a real floating-point dtype")
                check_parameter(parameter, name)
                self._check_decomposition(group, _switches(group), parameter, (index, place))
        for index, added in zip(new, values, strict=True):
            group = self.param_groups[index]
            group.setdefault("matrices", count_matrices(group["params"]))
            # A group from an older checkpoint lacks only some options and keeps the others.
            group.update(
                added if "steps_taken" not in group else {key: added[key] for key in added if key not in group}
            )

    def _check_decomposition(
        self, group: Mapping[str, Any], switches: str, parameter: Tensor, position: tuple[int, int]
    ) -> StepDecomposition:
        """How the base steps a parameter. Probe once for parameters of the same kind, and try their shards."""
        key = (switches, parameter.ndim, parameter.dtype)
        if key not in self._decompositions:
            decomposition = find_decomposition(self.base, group, parameter.ndim)
            if not decomposition.zeroed and parameter.dtype.itemsize < 4:
                raise ValueError(
                    f"SpectralClipping cannot wrap {type(self.base).__name__} for parameters of {parameter.dtype}: its "
                    f"update depends on the weights, so it must be computed as a difference of weights, for which that "
                    f"dtype has too few digits; keep the weights in float32"
                )
            self._decompositions[key] = decomposition
        if is_dtensor(parameter):
            name = self._name(position)
            trial = (switches, *trial_of(parameter, name))
            if trial not in self._tried:
                try_shards(self.base, group, parameter, name)
                self._tried.add(trial)
        return self._decompositions[key]

    # -- The step ------------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        self._share(self.base)
        for index, group in enumerate(self.param_groups):
            check_group(group, f"group {index} of {type(self.base).__name__}")

    def _rule_of_step(self, group: Mapping[str, Any], role: str, vector: bool, index: int) -> Rule:
        return rule_of_changes(group, role, vector=vector, index=index)

    def _state_of_step(self, parameter: Tensor, position: Position, rule: Rule) -> dict[str, Tensor]:
        """The counts of steps, which the library's optimizers keep in their state; here the state is the base's."""
        if position not in self._counts or self._counts[position]["step"].device != parameter.device:
            self._counts[position] = {key: torch.zeros((), device=parameter.device) for key in ("step", "skipped")}
        return self._counts[position]

    def _counts_of(self, parameter: Tensor, position: Position) -> Mapping[str, Tensor]:
        return self._counts.get(position, {})

    def _take(self, entries: list[Entry]) -> bool:
        taken = screen(entries, self.param_groups, self._watch)
        # The base does not support skip flags, so they are read from the device.
        flags = {id(entry.found): entry.found for entry in taken if entry.found is not None}
        skipped = {key for key, found in flags.items() if bool(found)}
        stepping = [entry for entry in taken if id(entry.found) not in skipped]
        if not stepping and entries:
            return False
        for entry in stepping:
            entry.found = None
        resting = [entry for entry in entries if entry not in set(stepping)]
        switches = [_switches(group) for group in self.param_groups]
        stepped: list[WrappedEntry] = []
        hidden: list[tuple[Tensor, Tensor | None]] = []
        try:
            for entry in resting:
                parameter = self._parameter(entry)
                hidden.append((parameter, parameter.grad))
                parameter.grad = None
            for entry in stepping:
                group, parameter = self.param_groups[entry.position[0]], self._parameter(entry)
                kind = switches[entry.position[0]]
                decomposition = self._check_decomposition(group, kind, parameter, entry.position)
                stepped.append(wrapped(entry, parameter, decomposition, float(group.get("weight_decay") or 0.0)))
            self.base.step()
            clip_changes(stepped, self.param_groups)
        finally:
            # Also after an exception, so that no weight stays zero.
            for entry in stepped:
                entry.restore()
            for parameter, grad in hidden:
                parameter.grad = grad
        return True

    def _parameter(self, entry: Entry) -> Tensor:
        """The parameter in the base's groups; for a shard, the DTensor."""
        group, index = entry.position
        parameter: Tensor = self.param_groups[group]["params"][index]
        return parameter


def _switches(group: Mapping[str, Any]) -> str:
    """A key of the base's options on which the decomposition may depend: flags, strings and decays, but not numbers
    that schedulers change."""
    ours = (*ADDED_KEYS, "role", "layout")
    base = [(key, value) for key, value in group.items() if key not in ours]
    return repr([(key, value) for key, value in base if isinstance(value, bool | str) or "decay" in key])
