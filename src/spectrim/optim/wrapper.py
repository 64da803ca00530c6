"""SpectralClipping: the clip box around an optimizer that exists already.

The base optimizer keeps its groups, its state and its arithmetic; only what it would add to the weights is clipped on
the way, by the same functions that clip the library's own recipes. How that change is come by is measured in
:mod:`probe`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from spectrim.operators._stack import reading_is_free
from spectrim.optim.clipping_options import CLIPPING_KEYS, clipping_defaults, clipping_values
from spectrim.optim.entries import buckets, parameter_name, role_and_layout
from spectrim.optim.gradient import squared_norm
from spectrim.optim.held import Held
from spectrim.optim.layout import matrices
from spectrim.optim.optimizer import SpectralOptimizer
from spectrim.optim.options import ClippingOptions, is_zero
from spectrim.optim.probe import Manner, check_base, find_manner
from spectrim.optim.recipe import PLAIN_ADAMW
from spectrim.optim.schedule import clip_threshold
from spectrim.optim.shaping import apply_update, shape_matrices, shape_vector

__all__ = ["SpectralClipping"]


class SpectralClipping(Optimizer):
    r"""Clip the updates of any optimizer spectrally: the base finds the direction U, the wrapper takes the step.

        U ← the base's direction;   X ← keep · X − η √max(1, m/n) H_c(U)       H_c(U) = Σ σ/√(1+σ²/c²) uvᵀ

    keep is the base's decoupled weight decay: it is taken out before the clip and applied as the base would.

    Args:
        optimizer: the base. From here on, step, save and load the wrapper. The two share their param groups and state,
            so a scheduler on either drives both. Groups of :func:`spectrim.param_groups` say what each parameter
            is; in plain ones, 2-D and 3-D parameters are matrices and the rest vectors.
        clip: threshold c of the update's singular values; "auto" is 0.01 over the group's peak learning rate, None
            leaves the base's steps as they are.
        options: see :class:`~spectrim.optim.options.ClippingOptions`. ``clip_scope`` is "all": embeddings and
            heads are clipped as matrices, vectors by their norm; "matrices" leaves them to the base.

    Raises:
        ValueError: a value that is not allowed, or a base that cannot be wrapped, by name and with the reason.
        TypeError: an unknown keyword.

    How it works. A probe at construction tells, for every group, how the base steps (:mod:`~spectrim.optim.probe`):

    - Its change does not depend on the weights (AdamW, NAdam, Lion, SOAP, ...): the base steps on zeros, so that the
      change is what it leaves there, exactly and in any dtype.
    - Its decay goes into the gradient (SGD, RMSprop, Adam with ``weight_decay``): likewise, and the wrapper adds the
      decay to the gradient for the time of the step. Like the rest of U, it is clipped.
    - Its change depends on the weights (Adafactor, trust ratios): it steps on the weights, and the change is the
      difference. Only float32 and wider weights resolve that; others are refused.

    Refused are bases that need the closure themselves (LBFGS), that wrap another optimizer, or that keep weights of
    their own.

    Good to know. The weights are held twice during a step, since the base steps all parameters at once; so is the
    gradient where decay is coupled. Hooks of the base run, and see what the base sees: zeros for weights. A gradient
    that is not finite skips its whole parameter, state included; that is read from the device, once a step. At
    learning rate 0 nothing moves. Decay of vectors is the base's business: set it in the groups.

    Source: arXiv 2603.14315.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        clip: float | Literal["auto"] | None = "auto",
        **options: Unpack[ClippingOptions],
    ) -> None:
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, SpectralOptimizer):
            name = type(optimizer).__name__
            raise TypeError(f"cannot wrap {name}: expected a torch.optim.Optimizer, and none that has clip=... itself")
        check_base(optimizer)
        self._clipping = clipping_defaults(clip, options)
        self._skipped: dict[tuple[int, int], int] = {}
        self._manners: dict[tuple[Any, ...], Manner] = {}
        super().__init__(optimizer.param_groups, dict(optimizer.defaults))
        self.defaults.update({key: self._clipping[key] for key in CLIPPING_KEYS})
        self.base = optimizer
        self._share(optimizer)
        optimizer.register_load_state_dict_post_hook(self._share)

    # -- Groups and state: the base's ----------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base, with the clip options it lacks."""
        if "base" not in vars(self):
            # torch's constructor, which lists the groups that the base has already.
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
        """What happens to a parameter of this group, in a few words; ``describe`` shows it."""
        role, layout = role_and_layout(group, parameter)
        name = type(self.base).__name__
        if group["clip"] is None or not _in_scope(group, role):
            return name
        return f"{name} → {'clip norm' if layout == 'vector' else 'clip'}"

    def skipped_steps(self) -> dict[str, int]:
        """How many steps each parameter skipped because its gradient was not finite, for those that skipped any.

        A parameter without a name is called by its group and position.
        """
        return {self._name(position): count for position, count in self._skipped.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "base": self.base, "_clipping": self._clipping}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._skipped, self._manners = {}, {}
        self.base.register_load_state_dict_post_hook(self._share)

    def _share(self, base: Optimizer) -> None:
        """Hold the base's groups and state, completing the groups: all of them, or none where one is refused."""
        self.param_groups, self.state = base.param_groups, base.state
        new = [index for index, group in enumerate(self.param_groups) if "steps_taken" not in group]
        values = [clipping_values(base, index, self._clipping) for index in new]
        for index in new:
            self._check_parameters(index)
        for index, added in zip(new, values, strict=True):
            self.param_groups[index].update(added)

    def _check_parameters(self, index: int) -> None:
        group = self.param_groups[index]
        for position, parameter in enumerate(group["params"]):
            if not parameter.is_floating_point() or hasattr(parameter, "placements"):
                name, kind = self._name((index, position)), f"{type(parameter).__name__} of {parameter.dtype}"
                raise ValueError(f"{name} is a {kind}: expected a whole parameter of a real floating-point dtype")
            self._manner(group, _switches(group), parameter)

    def _manner(self, group: Mapping[str, Any], switches: str, parameter: Tensor) -> Manner:
        """How the base steps a parameter, probed once for all that are alike."""
        key = (switches, parameter.ndim, parameter.dtype)
        if key not in self._manners:
            manner = find_manner(self.base, group, parameter.ndim)
            if manner.way == "direct" and parameter.dtype.itemsize < 4:
                raise ValueError(
                    f"SpectralClipping cannot wrap {type(self.base).__name__} for parameters of {parameter.dtype}: its "
                    f"update depends on the weights, so it is found as a difference of weights, which that dtype "
                    f"rounds away; keep the weights in float32"
                )
            self._manners[key] = manner
        return self._manners[key]

    def _name(self, position: tuple[int, int]) -> str:
        return parameter_name(self.param_groups, position)

    # -- The step ------------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Let the base step, and clip what it changes.

        Args:
            closure: re-evaluates the model and returns the loss; called once, before the base steps.

        Raises:
            FloatingPointError: a gradient is not finite and its group says ``on_nonfinite="raise"``. Nothing has moved.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._share(self.base)
        unfit = self._unfit()
        switches = [_switches(group) for group in self.param_groups]
        held: list[list[Held]] = [[] for _ in self.param_groups]
        hidden: list[tuple[Tensor, Tensor]] = []
        try:
            for position, parameter, grad in self._with_gradient():
                if position in unfit:
                    hidden.append((parameter, grad))
                    parameter.grad = None
                else:
                    held[position[0]].append(self._hold(position, parameter, grad, switches[position[0]]))
            self.base.step()
            for group, entries in zip(self.param_groups, held, strict=True):
                if is_zero(group["lr"]):
                    continue
                for bucket in buckets(entry for entry in entries if not entry.idled()):
                    self._update(group, bucket)
                group["steps_taken"] += 1
        finally:
            # Also after a step that failed: no weight stays zero.
            for entries in held:
                for entry in entries:
                    entry.restore()
            for parameter, grad in hidden:
                parameter.grad = grad
        return loss

    def _with_gradient(self) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
        """Position, parameter and gradient of every parameter that has one."""
        for group_index, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    yield (group_index, index), parameter, parameter.grad

    def _unfit(self) -> set[tuple[int, int]]:
        """The positions of parameters whose gradient is not finite, counted; or an error, where groups ask for it."""
        energies: dict[torch.device, dict[tuple[int, int], Tensor]] = {}
        for position, _, grad in self._with_gradient():
            if grad.is_sparse:
                raise RuntimeError(f"the gradient of {self._name(position)} is sparse: expected a dense one")
            energies.setdefault(grad.device, {})[position] = squared_norm(grad).double()
        unfit = set()
        for found in energies.values():
            # One read for each device: that a base sees no gradient is decided on the host.
            for position, number in zip(found, torch.stack(list(found.values())).tolist(), strict=True):
                if math.isfinite(number):
                    continue
                if self.param_groups[position[0]]["on_nonfinite"] == "raise":
                    raise FloatingPointError(
                        f"the gradient of {self._name(position)} is not finite (squared norm {number}); no parameter "
                        f'was updated. on_nonfinite="skip" would leave this one as it is and go on.'
                    )
                unfit.add(position)
        for position in unfit:
            self._skipped[position] = self._skipped.get(position, 0) + 1
        return unfit

    def _hold(self, position: tuple[int, int], parameter: Tensor, grad: Tensor, switches: str) -> Held:
        """Set a weight aside, and give the base what it is to step on."""
        group = self.param_groups[position[0]]
        role, layout = role_and_layout(group, parameter)
        return Held(
            parameter=parameter,
            grad=grad,
            role=role,
            layout=layout,
            position=position,
            manner=self._manner(group, switches, parameter),
            weight_decay=float(group.get("weight_decay") or 0.0),
        )

    def _update(self, group: dict[str, Any], bucket: list[Held]) -> None:
        """Clip what the base did to one bucket: entries of one role, layout, shape, dtype and device.

        Clipping commutes with scaling, η H_c(U) = H_ηc(ηU): what the base added, −ηU, is clipped as it is, at ηc.
        """
        role, layout = bucket[0].role, bucket[0].layout
        lr = _usable(group["lr"])
        keep = bucket[0].manner.keep(lr)
        threshold = clip_threshold({**group, "lr": lr}) if _in_scope(group, role) else None
        limit = None if threshold is None else threshold * lr
        options = {**group, "scale": "none"}
        directions = [entry.direction(keep) for entry in bucket]
        for entry in bucket:
            entry.restore()
        if layout == "vector":
            for entry, direction in zip(bucket, directions, strict=True):
                apply_update(entry.parameter, shape_vector(direction, options, threshold=limit), 1.0, keep=keep)
            return
        stacked = torch.stack(directions) if len(directions) > 1 else directions[0].unsqueeze(0)
        for part, view in enumerate(matrices(stacked, layout, group["split"], leading=1)):
            update = shape_matrices(view, PLAIN_ADAMW, options, threshold=limit)[0]
            for index, entry in enumerate(bucket):
                weight = matrices(entry.parameter, layout, group["split"])[part]
                apply_update(weight, update.at(index), 1.0, keep=keep)


def _switches(group: Mapping[str, Any]) -> str:
    """The base's options on which the manner may depend: not the numbers that a schedule moves, save the decay."""
    ours = (*CLIPPING_KEYS, "role", "layout")
    base = [(key, value) for key, value in group.items() if key not in ours]
    return repr([(key, value) for key, value in base if isinstance(value, bool | str) or "decay" in key])


def _in_scope(group: Mapping[str, Any], role: str) -> bool:
    return group["clip_scope"] == "all" or role == "matrix"


def _usable(lr: float | Tensor) -> float | Tensor:
    """A learning rate as a number where reading it is free; else one by which to divide, even if zero."""
    if not isinstance(lr, Tensor):
        return lr
    return float(lr) if reading_is_free(lr) else lr.clamp_min(torch.finfo(lr.dtype).tiny)
