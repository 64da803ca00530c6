"""The one optimizer class: groups → same-shape buckets → direction → operator → step.

Every named optimizer is this class with another :class:`~spectrim.optim.recipe.Recipe`. ``step`` runs in named phases:
*collect* the parameters that have a gradient, *screen* out non-finite ones, then bucket by bucket *direct* each
gradient into a base direction, entry by entry, *shape* whole matrices, and *apply* the update.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from spectrim.distributed.sharding import sharding_of
from spectrim.operators._stack import reading_is_free
from spectrim.optim.agreement import Agreement, raise_nonfinite
from spectrim.optim.entries import Entry, buckets, parameter_name, role_and_layout
from spectrim.optim.entrywise import apply, direct, fused_adamw, fused_adamw_serves, is_adamw, is_plain_adamw, store
from spectrim.optim.gradient import squared_norm
from spectrim.optim.layout import Layout, matrices
from spectrim.optim.options import complete_options, effective_options, finish_group, is_zero
from spectrim.optim.recipe import PLAIN_ADAMW, Recipe
from spectrim.optim.rounds import Loads
from spectrim.optim.schedule import clip_threshold
from spectrim.optim.shaping import basis_slices, shape_matrices, shape_vector
from spectrim.optim.sharded import ShardedEntry, screen, sharded_entry, start_basis_of
from spectrim.optim.sharded_update import ShardedUpdate

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
        self._agreement = Agreement()
        super().__init__(params, complete_options(options, extra))

    # -- Groups and state ----------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, completing its options from the defaults, and create its state."""
        index = len(self.param_groups)
        finish_group(param_group, self.defaults, index)
        super().add_param_group(param_group)
        group = self.param_groups[index]
        for position, parameter in enumerate(group["params"]):
            self._create_state(parameter, group, self._name((index, position)))

    def rule(self, group: Mapping[str, Any], parameter: Tensor) -> str:
        """What happens to a parameter of this group, in a few words; ``describe`` shows it."""
        role, layout = role_and_layout(group, parameter)
        recipe = self._recipe(group, role)
        options = effective_options(group, role, follows=recipe is self.recipe)
        if is_plain_adamw(recipe, options):
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
        self._agreement = Agreement()

    def _create_state(self, parameter: Tensor, group: Mapping[str, Any], name: str) -> None:
        if not parameter.is_floating_point():
            raise ValueError(f"a parameter of dtype {parameter.dtype}: expected a real floating-point dtype")
        role, layout = role_and_layout(group, parameter)
        if isinstance(parameter, DTensor):
            sharding_of(parameter, name)
        recipe = self._recipe(group, role)
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        kept = torch.bfloat16 if group["state_dtype"] == "bfloat16" else dtype
        state = self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for key in recipe.direction.state:
            # Of a DTensor's layout where the parameter is one, so that checkpoints know what is where.
            state[key] = torch.zeros_like(parameter, dtype=kept, requires_grad=False)
        if recipe.operator == "shape_spike" and layout != "vector":
            state["spike_basis"] = start_basis_of(parameter, layout, group["split"], group["rank_ratio"], dtype)

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
        sharded = [entry for entries in collected for entry in entries if isinstance(entry, ShardedEntry)]
        if sharded:
            self._agreement.check(self.param_groups, sharded)
            screen(sharded)
        asked = [group["on_nonfinite"] == "raise" for group in self.param_groups]
        if any(asked):
            asking = itertools.compress(collected, asked)
            raise_nonfinite(self._nonfinite(itertools.chain.from_iterable(asking)), sharded)
        # Carried from group to group, so that owners share the work of a whole step evenly.
        loads: Loads = {}
        for group, entries in zip(self.param_groups, collected, strict=True):
            here, across = self._divided(group, entries)
            for bucket in buckets(here):
                # Screened here and not all at once before, so that what is read is still in the host's cache.
                taking = [entry for entry in bucket if self._takes_step(entry)]
                if taking:
                    self._update(group, taking)
            self._update_across(group, [entry for entry in across if self._takes_step(entry)], loads)
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
                position = (group_index, index)
                if parameter.grad is None and not (isinstance(parameter, DTensor) and parameter.requires_grad):
                    continue
                if not self.state[parameter]:
                    swapped = True
                    self._create_state(parameter, group, self._name(position))
                entries.append(self._entry(parameter, group, position))
            collected.append(entries)
        if swapped:
            self._drop_orphans()
        return collected

    def _entry(self, parameter: Tensor, group: Mapping[str, Any], position: tuple[int, int]) -> Entry:
        role, layout = role_and_layout(group, parameter)
        state = self.state[parameter]
        if not isinstance(parameter, DTensor):
            grad = parameter.grad
            assert grad is not None
            if grad.is_sparse:
                raise RuntimeError(f"the gradient of {self._name(position)} is sparse: expected a dense one")
            return Entry(parameter=parameter, grad=grad, state=state, role=role, layout=layout, position=position)
        entry = sharded_entry(parameter, group, position, self._name(position), state)
        recipe = self._recipe(group, role)
        options = effective_options(group, role, follows=recipe is self.recipe)
        shrinks = options["shrink"] is not None and options["shrink_at"] == "gradient"
        entry.shares_scales = shrinks and not entry.is_served_locally(recipe, options)
        return entry

    def _divided(self, group: dict[str, Any], entries: list[Entry]) -> tuple[list[Entry], list[ShardedEntry]]:
        """The entries whose step needs this rank alone, and those that need others."""
        here: list[Entry] = []
        across: list[ShardedEntry] = []
        for entry in entries:
            recipe = self._recipe(group, entry.role)
            options = effective_options(group, entry.role, follows=recipe is self.recipe)
            if isinstance(entry, ShardedEntry) and not entry.is_served_locally(recipe, options):
                across.append(entry)
            else:
                here.append(entry)
        return here, across

    def _update_across(self, group: dict[str, Any], entries: list[ShardedEntry], loads: Loads) -> None:
        """Step entries of sharded parameters together with the other ranks."""
        alike: dict[tuple[Any, ...], list[ShardedEntry]] = {}
        for entry in entries:
            alike.setdefault((entry.role, entry.layout, entry.parameter.dtype), []).append(entry)
        for (role, layout, _), same in alike.items():
            recipe = self._recipe(group, role)
            options = effective_options(group, role, follows=recipe is self.recipe)
            decay = self._weight_decay(options, layout)
            update = ShardedUpdate(recipe=recipe, options=options, layout=layout, weight_decay=decay, loads=loads)
            update.run(same)

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
        if entry.grad.numel() == 0 and entry.energy is None:
            return True
        lr = self.param_groups[entry.position[0]]["lr"]
        energy = squared_norm(entry.grad) if entry.energy is None else entry.energy
        if not reading_is_free(energy):
            finite = energy.isfinite()
            entry.taken = finite & ((energy > 0) | (torch.as_tensor(lr, device=energy.device) != 0))
            if entry.present is not None:
                entry.taken = entry.taken & entry.present
            entry.grad = torch.where(entry.taken, entry.grad, 0)
            self._skipped[entry.position] = self._skipped.get(entry.position, 0) + (~finite).int()
            return True
        if entry.present is not None and not entry.present:
            return False
        number = energy.item()
        if math.isfinite(number):
            return number > 0 or not is_zero(lr)
        self._skipped[entry.position] = self._skipped.get(entry.position, 0) + 1
        return False

    def _nonfinite(self, entries: Iterable[Entry]) -> tuple[str, float] | None:
        """Name and squared norm of the first gradient that is not finite. Reads the device."""
        for entry in entries:
            energy = squared_norm(entry.grad) if entry.energy is None else entry.energy
            if not math.isfinite(number := energy.item()):
                return self._name(entry.position), number
        return None

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
        if is_adamw(recipe, options) and all(fused_adamw_serves(entry, options) for entry in bucket):
            for entry in bucket:
                fused_adamw(entry, options, decay)
            return
        directions = [direct(recipe, options, entry) for entry in bucket]
        if is_zero(group["lr"]):
            return
        threshold = clip_threshold(options)
        if layout == "vector":
            for entry, direction in zip(bucket, directions, strict=True):
                apply(entry, entry.parameter, shape_vector(direction, options, threshold=threshold), options, decay)
            return
        held = [value for entry in bucket for value in (entry.grad, *entry.state.values())]
        spendable = len(bucket) > 1 or all(direction is not value for direction in directions for value in held)
        views = matrices(_stacked(directions), layout, options["split"], leading=1)
        slices = basis_slices(views, options["rank_ratio"]) if recipe.operator == "shape_spike" else [None] * len(views)
        for part, (view, columns) in enumerate(zip(views, slices, strict=True)):
            basis = None
            if columns is not None:
                basis = _stacked([entry.state["spike_basis"][..., columns] for entry in bucket])
            update, new_basis = shape_matrices(
                view, recipe, options, threshold=threshold, basis=basis, overwrite=spendable
            )
            for index, entry in enumerate(bucket):
                weight = matrices(entry.parameter, layout, options["split"])[part]
                apply(entry, weight, update.at(index), options, decay)
                if new_basis is not None:
                    store(entry, entry.state["spike_basis"][..., columns], new_basis[index])

    def _weight_decay(self, options: Mapping[str, Any], layout: Layout) -> float:
        """Decay never touches vectors, save in a plain list given to AdamW with everything off: torch's AdamW."""
        torch_like = options.get("role") is None and is_plain_adamw(self.recipe, options)
        return float(options["weight_decay"]) if layout != "vector" or torch_like else 0.0


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    # A single one stays where it is: a copy into a stack of one would cost a pass over it.
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)
