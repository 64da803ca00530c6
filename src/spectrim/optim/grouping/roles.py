"""Roles of parameters, and the sites at which a model holds them. :mod:`reading` derives a role from a site."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from spectrim.optim.grouping.layout import Layout

__all__ = ["ROLES", "Reading", "Role", "Site", "class_names", "sites"]

Role = Literal["matrix", "embedding", "head", "vector"]
ROLES: tuple[str, ...] = get_args(Role)

# Names under which a wrapper holds the module that it wraps.
_WRAPPED_AS = frozenset(
    {
        "_orig_mod",  # torch.compile
        "_checkpoint_wrapped_module",  # activation checkpointing
        "_fsdp_wrapped_module",  # FSDP1
        "base_layer",  # a PEFT adapter around a layer
        "original_module",  # a PEFT copy of a layer that is trained in full
    }
)

_DATA_PARALLEL = frozenset({"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"})


@dataclass(frozen=True)
class Reading:
    """A parameter's role, and its layout as matrices."""

    role: Role
    layout: Layout
    split: tuple[int | str, ...] | None = None


@dataclass(frozen=True)
class Site:
    """One place where a model holds a parameter; a tied parameter has several.

    Attributes:
        name: the full name, as ``named_parameters`` gives it.
        leaf: the attribute's name in its holder, such as "weight".
        parameter: the parameter held there.
        path: the names of the enclosing modules below the model, without wrappers.
        owners: the enclosing modules: the model first, then one for each name of the path, the holder last.
        is_output: the holder is in the module that the model's ``get_output_embeddings`` returns.
    """

    name: str
    leaf: str
    parameter: nn.Parameter
    path: tuple[str, ...]
    owners: tuple[nn.Module, ...]
    is_output: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape; a sharded parameter's whole shape."""
        return tuple(self.parameter.shape)

    @property
    def holder(self) -> nn.Module:
        """The module that holds the parameter."""
        return self.owners[-1]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The class names of the holder."""
        return class_names(self.holder)

    @property
    def attribute(self) -> str:
        """The name of the holder in the module around it; empty for the model itself."""
        return self.path[-1] if self.path else ""

    @property
    def around(self) -> nn.Module | None:
        """The module around the holder."""
        return self.owners[-2] if len(self.owners) > 1 else None


def class_names(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's class and its base classes, up to ``nn.Module``.

    Base classes are included because sharding and parametrization replace a module's class by a derived one.
    """
    kinds = type(module).__mro__
    return tuple(kind.__name__ for kind in kinds[: kinds.index(nn.Module)])


def sites(model: nn.Module) -> Iterator[Site]:
    """Every place where the model holds a parameter, in the order of ``named_parameters``."""
    core = _core(model)
    output = _output_embeddings(core)
    for full_path, owners in _walk(model, (), (model,)):
        path, kept = _without_wrappers(full_path, owners, core)
        for leaf, parameter in owners[-1]._parameters.items():
            if parameter is not None:
                is_output = any(owner is output for owner in owners)
                yield Site(".".join((*full_path, leaf)), leaf, parameter, path, kept, is_output)


def _walk(
    module: nn.Module, path: tuple[str, ...], owners: tuple[nn.Module, ...]
) -> Iterator[tuple[tuple[str, ...], tuple[nn.Module, ...]]]:
    yield path, owners
    for name, child in module._modules.items():
        if child is not None and not any(child is owner for owner in owners):
            yield from _walk(child, (*path, name), (*owners, child))


def _core(model: nn.Module) -> nn.Module:
    """The model without wrappers of compilation, data parallelism and PEFT."""
    while True:
        if "_orig_mod" in model._modules:
            inner: Any = model._modules["_orig_mod"]
        elif not _DATA_PARALLEL.isdisjoint(class_names(model)):
            inner = model.module
        elif "PeftModel" in class_names(model) and callable(get_base_model := getattr(model, "get_base_model", None)):
            inner = get_base_model()
        else:
            return model
        if inner is None or inner is model:
            return model
        model = inner


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    """The output embeddings of a transformers model, or None."""
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    if not callable(get_output_embeddings):
        return None
    try:
        output = get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return output if isinstance(output, nn.Module) else None


def _without_wrappers(
    path: tuple[str, ...], owners: tuple[nn.Module, ...], core: nn.Module
) -> tuple[tuple[str, ...], tuple[nn.Module, ...]]:
    """Path and owners from the core model down; a wrapped module takes the name and place of its wrapper."""
    start = next((i for i, owner in enumerate(owners) if owner is core), 0)
    names: list[str] = []
    kept = [owners[start]]
    for name, owner in zip(path[start:], owners[start + 1 :], strict=True):
        if name in _WRAPPED_AS:
            kept[-1] = owner
        elif names and names[-1] == "modules_to_save":
            # PEFT's "lm_head.modules_to_save.default" is a copy of lm_head: it takes the place of its wrapper.
            names.pop()
            kept[-2:] = [owner]
        else:
            names.append(name)
            kept.append(owner)
    return tuple(names), tuple(kept)
