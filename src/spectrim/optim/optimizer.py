"""The one optimizer class: groups → same-shape buckets → direction → operator → step.

Every named optimizer is this class with another :class:`~spectrim.optim.recipe.Recipe`. ``step`` runs in named phases:
*collect* the parameters that have a gradient, *screen* out non-finite ones, then bucket by bucket *direct* each
gradient into a base direction, entry by entry, *shape* whole matrices, and *apply* the update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from spectrim.operators._stack import reading_is_free
from spectrim.optim.directions import ADAM, fused_kernel_serves
from spectrim.optim.entries import Entry, buckets, parameter_name, role_and_layout
from spectrim.optim.gradient import prepare, shrink_entries, shrinks_in_blocks, shrunk_blocks, squared_norm
from spectrim.optim.layout import Layout, matrices
from spectrim.optim.options import complete_options, effective_options, finish_group, is_zero
from spectrim.optim.recipe import PLAIN_ADAMW, Recipe
from spectrim.optim.rounding import round_stochastically_
from spectrim.optim.schedule import clip_threshold
from spectrim.optim.shaping import Update, apply_update, basis_slices, shape_matrices, shape_vector, start_bases

__all__ = ["SpectralOptimizer"]


class SpectralOptimizer(Optimizer):
    """The base of every spectrim optimizer. A subclass names a recipe and passes its options to ``__init__``.

    The options become the defaults of every param group. Groups made by :func:`spectrim.param_groups` say what each
    parameter is; a plain list of parameters is taken at its word: 2-D and 3-D ones are matrices, the rest vectors.

    Args:
        params: as for every torch optimizer; named parameters are named in messages.
        options: the subclass's own options, "lr" and "weight_decay" among them.
        extra: keywords of :class:`~spectrim.optim.options.SpectralOptions` that the caller gave.

    Raises:
        TypeError: an unknown keyword.
        ValueError: a value that is not allowed, naming it, the group and the choices.
    """

    recipe: ClassVar[Recipe]

    def __init__(self, params: ParamsT, options: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        self._skipped: dict[tuple[int, int], int | Tensor] = {}
        super().__init__(params, complete_options(options, extra))

    # -- Groups and state ----------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, completing its options from the defaults, and create its state."""
        index = len(self.param_groups)
        finish_group(param_group, self.defaults, index)
        super().add_param_group(param_group)
        group = self.param_groups[index]
        for parameter in group["params"]:
            self._create_state(parameter, group)

    def rule(self, group: Mapping[str, Any], parameter: Tensor) -> str:
        """What happens to a parameter of this group, in a few words; ``describe`` shows it."""
        role, layout = role_and_layout(group, parameter)
        recipe = self._recipe(group, role)
        options = effective_options(group, role, follows=recipe is self.recipe)
        if _is_plain_adamw(recipe, options):
            return "adamw"
        words = [recipe.direction.name]
        if options["pre_clip"] is not None and layout != "vector":
            words.insert(0, "pre-clip")
        if options["shrink"] is not None:
            words.insert(0, "shrink")
        if recipe.operator != "none" and layout != "vector":
            words.append(recipe.operator.replace("_", " "))
        if options["clip"] is not None:
            words.append("clip norm" if layout == "vector" else "clip")
        return " → ".join(words)

    def skipped_steps(self) -> dict[str, int]:
        """How many steps each parameter skipped because its gradient was not finite, for those that skipped any.

        Reads the device. A parameter without a name is called by its group and position.
        """
        counts = {self._name(position): int(count) for position, count in self._skipped.items()}
        return {name: count for name, count in counts.items() if count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict as torch does, save that every tensor keeps the dtype in which it was saved."""
        super().load_state_dict(state_dict)
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            for key, saved in state_dict["state"].get(index, {}).items():
                loaded = self.state[parameter][key]
                if isinstance(saved, Tensor) and loaded.dtype != saved.dtype:
                    self.state[parameter][key] = saved.detach().to(device=loaded.device, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._skipped = {}

    def _create_state(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        if not parameter.is_floating_point():
            raise ValueError(f"a parameter of dtype {parameter.dtype}: expected a real floating-point dtype")
        role, layout = role_and_layout(group, parameter)
        recipe = self._recipe(group, role)
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        kept = torch.bfloat16 if group["state_dtype"] == "bfloat16" else dtype
        state = self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for key in recipe.direction.state:
            state[key] = torch.zeros_like(parameter, dtype=kept, requires_grad=False)
        if recipe.operator == "shape_spike":
            state["spike_basis"] = start_bases(matrices(parameter, layout, group["split"]), group["rank_ratio"], dtype)

    def _recipe(self, group: Mapping[str, Any], role: str) -> Recipe:
        return self.recipe if group["clip_scope"] == "all" or role == "matrix" else PLAIN_ADAMW

    def _name(self, position: tuple[int, int]) -> str:
        return parameter_name(self.param_groups, position)

    # -- The step ------------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss.

        Raises:
            FloatingPointError: a gradient is not finite and its group says ``on_nonfinite="raise"``. Nothing has moved.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        collected = self._collect()
        for group, entries in zip(self.param_groups, collected, strict=True):
            if group["on_nonfinite"] == "raise":
                self._raise_on_nonfinite(entries)
        for group, entries in zip(self.param_groups, collected, strict=True):
            for bucket in buckets(entries):
                # Screened here and not all at once before, so that what is read is still in the host's cache.
                taking = [entry for entry in bucket if self._takes_step(entry)]
                if taking:
                    self._update(group, taking)
            if not is_zero(group["lr"]):
                group["steps_taken"] += 1
        return loss

    def _collect(self) -> list[list[Entry]]:
        """For every group, its parameters that have a gradient, with state created where it is missing."""
        swapped = False
        collected: list[list[Entry]] = []
        for group_index, group in enumerate(self.param_groups):
            entries = []
            for index, parameter in enumerate(group["params"]):
                grad = parameter.grad
                if grad is None:
                    continue
                position = (group_index, index)
                if grad.is_sparse:
                    raise RuntimeError(f"the gradient of {self._name(position)} is sparse: expected a dense one")
                if not self.state[parameter]:
                    swapped = True
                    self._create_state(parameter, group)
                role, layout = role_and_layout(group, parameter)
                state = self.state[parameter]
                entries.append(
                    Entry(parameter=parameter, grad=grad, state=state, role=role, layout=layout, position=position)
                )
            collected.append(entries)
        if swapped:
            self._drop_orphans()
        return collected

    def _drop_orphans(self) -> None:
        """Forget the state of parameters that were swapped out of the groups after construction."""
        held = {parameter for group in self.param_groups for parameter in group["params"]}
        for parameter in [parameter for parameter in self.state if parameter not in held]:
            del self.state[parameter]

    def _takes_step(self, entry: Entry) -> bool:
        """Whether a parameter is updated in this step: not where its gradient is not finite.

        Nor where a zero gradient meets a zero learning rate: so does checkpointing prime an optimizer, and priming
        must leave it fresh. Where reading would stall the device the answer is yes, and the entry carries the flag.
        """
        if entry.grad.numel() == 0:
            return True
        lr = self.param_groups[entry.position[0]]["lr"]
        energy = squared_norm(entry.grad)
        if not reading_is_free(energy):
            finite = energy.isfinite()
            entry.taken = finite & ((energy > 0) | (torch.as_tensor(lr, device=energy.device) != 0))
            entry.grad = torch.where(entry.taken, entry.grad, 0)
            self._skipped[entry.position] = self._skipped.get(entry.position, 0) + (~finite).int()
            return True
        number = energy.item()
        if math.isfinite(number):
            return number > 0 or not is_zero(lr)
        self._skipped[entry.position] = self._skipped.get(entry.position, 0) + 1
        return False

    def _raise_on_nonfinite(self, entries: list[Entry]) -> None:
        for entry in entries:
            if entry.grad.numel() and not math.isfinite(number := squared_norm(entry.grad).item()):
                raise FloatingPointError(
                    f"the gradient of {self._name(entry.position)} is not finite (squared norm {number}); no "
                    f'parameter was updated. on_nonfinite="skip" would leave this one as it is and go on.'
                )

    def _update(self, group: dict[str, Any], bucket: list[Entry]) -> None:
        """Direct, shape and apply one bucket: entries of one role, layout, shape, dtype and device."""
        role, layout = bucket[0].role, bucket[0].layout
        recipe = self._recipe(group, role)
        options = effective_options(group, role, follows=recipe is self.recipe)
        decay = self._weight_decay(options, layout)
        for entry in bucket:
            entry.state["step"] += 1 if entry.taken is None else entry.taken
        if bucket[0].parameter.numel() == 0:
            return
        if _is_adamw(recipe, options) and all(_fused_kernel_serves(entry, options) for entry in bucket):
            for entry in bucket:
                _fused_adamw(entry, options, decay)
            return
        directions = [_direct(recipe, options, entry) for entry in bucket]
        if is_zero(group["lr"]):
            return
        threshold = clip_threshold(options)
        if layout == "vector":
            for entry, direction in zip(bucket, directions, strict=True):
                _apply(entry, entry.parameter, shape_vector(direction, options, threshold=threshold), options, decay)
            return
        held = [value for entry in bucket for value in (entry.grad, *entry.state.values())]
        spendable = len(bucket) > 1 or all(direction is not value for direction in directions for value in held)
        # A single matrix stays where it is: a copy into a stack of one would cost a pass over it.
        stacked = torch.stack(directions) if len(directions) > 1 else directions[0].unsqueeze(0)
        views = matrices(stacked, layout, options["split"], leading=1)
        slices = basis_slices(views, options["rank_ratio"]) if recipe.operator == "shape_spike" else [None] * len(views)
        for part, (view, columns) in enumerate(zip(views, slices, strict=True)):
            basis = None
            if columns is not None:
                basis = torch.stack([entry.state["spike_basis"][..., columns] for entry in bucket])
            update, new_basis = shape_matrices(
                view, recipe, options, threshold=threshold, basis=basis, overwrite=spendable
            )
            for index, entry in enumerate(bucket):
                weight = matrices(entry.parameter, layout, options["split"])[part]
                _apply(entry, weight, update.at(index), options, decay)
                if new_basis is not None:
                    _store(entry, entry.state["spike_basis"][..., columns], new_basis[index])

    def _weight_decay(self, options: Mapping[str, Any], layout: Layout) -> float:
        """Decay never touches vectors, save in a plain list given to AdamW with everything off: torch's AdamW."""
        torch_like = options.get("role") is None and _is_plain_adamw(self.recipe, options)
        return float(options["weight_decay"]) if layout != "vector" or torch_like else 0.0


def _is_plain_adamw(recipe: Recipe, options: Mapping[str, Any]) -> bool:
    return _is_adamw(recipe, options) and options["shrink"] is None


def _is_adamw(recipe: Recipe, options: Mapping[str, Any]) -> bool:
    """Whether a step is torch's AdamW, but for a gradient that may be shrunk first."""
    plain = recipe.direction is ADAM and recipe.operator == "none" and options["scale"] == "none"
    return plain and options["clip"] is None and options["pre_clip"] is None


def _fused_kernel_serves(entry: Entry, options: Mapping[str, Any]) -> bool:
    state = entry.state
    if not fused_kernel_serves(entry.parameter, entry.grad, state["exp_avg"], state["exp_avg_sq"]):
        return False
    return options["shrink"] is None or shrinks_in_blocks(entry.parameter, options, entry.layout)


def _fused_adamw(entry: Entry, options: Mapping[str, Any], weight_decay: float) -> None:
    """AdamW in one pass over memory, by torch's fused kernel; it takes the flag of a skipped step by itself.

    With shrinkage, in one more: what is shrunk goes to the kernel block by block and never to memory.
    """
    beta1, beta2 = options["betas"]
    tensors = (entry.parameter, entry.grad, entry.state["exp_avg"], entry.state["exp_avg_sq"])
    blocks = [tensors] if options["shrink"] is None else shrunk_blocks(*tensors, options=options)
    for parameter, grad, exp_avg, exp_avg_sq in blocks:
        torch._fused_adamw_(
            [parameter],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            [],
            [entry.state["step"]],
            lr=options["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=options["eps"],
            amsgrad=False,
            maximize=options["maximize"],
            found_inf=None if entry.taken is None else (~entry.taken).float(),
        )


def _direct(recipe: Recipe, options: Mapping[str, Any], entry: Entry) -> Tensor:
    """The base direction of one parameter, in float32 or better; updates its state."""
    grad, taken = prepare(entry.grad, options, entry.layout), entry.taken
    if taken is not None:
        options = {**options, **{key: _held(options[key], taken) for key in recipe.direction.decays}}
    stored = {key: entry.state[key] for key in recipe.direction.state}
    narrow = options["state_dtype"] == "bfloat16"
    state = {key: value.float() for key, value in stored.items()} if narrow else stored
    direction = recipe.direction.compute(grad, state, entry.state["step"], options)
    if narrow:
        for number, (key, value) in enumerate(stored.items()):
            round_stochastically_(value, state[key], _seed(options["steps_taken"], *entry.position, number))
    if options["shrink"] is not None and options["shrink_at"] == "direction":
        direction = shrink_entries(direction, options, entry.layout)
    return direction if taken is None else torch.where(taken, direction, 0)


def _seed(*numbers: int) -> int:
    """One seed for each place and moment at which state is rounded; the same in a resumed run."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number) % 2**63
    return seed


def _held(decay: float | tuple[float, ...], taken: Tensor) -> Any:
    """A decay, or several, that is 1 where the step is skipped: with a zero gradient the state then stays as it is."""
    if isinstance(decay, tuple):
        return tuple(_held(value, taken) for value in decay)
    # Float64, so that the float32 arithmetic it enters is that of the Python number.
    return torch.where(taken, torch.full((), decay, dtype=torch.float64, device=taken.device), 1.0)


def _apply(entry: Entry, weight: Tensor, update: Update, options: Mapping[str, Any], weight_decay: float) -> None:
    lr = options["lr"] if entry.taken is None else options["lr"] * entry.taken
    apply_update(weight, update, lr, keep=1 - lr * weight_decay)


def _store(entry: Entry, target: Tensor, value: Tensor) -> None:
    target.copy_(value if entry.taken is None else torch.where(entry.taken, value, target))
