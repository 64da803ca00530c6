"""Checkpoints of a run on several processes: a folder of torch.distributed.checkpoint, either complete or absent.

Every rank writes its own shards; any number of ranks, or one process, can read them. The folder is filled under a
temporary name and renamed when every rank is done. ``state.pt`` beside torch's files has all values that are not
tensors, and a checksum of every file. Reading executes no code: torch's index is a pickle, and only the classes that an
index needs are unpickled.
"""

import os
import pickle
import shutil
import warnings
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from spectrim.lab.errors import LabError
from spectrim.lab.files import PARTIAL, checksum, error_number, naming, sync_directory, write_atomically
from spectrim.lab.training.processes import ONE_PROCESS, Parallel

__all__ = ["STATE_FILE", "damaged_part", "load_shards", "load_whole", "read_tensors", "save_shards"]

STATE_FILE = "state.pt"
"""Has all values that are not tensors; written last."""

INDEX = ".metadata"
"""Torch's list of the place of every tensor."""

METADATA_CLASSES = (
    *("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata"),
    *("TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
)

WEIGHTS, STATE = "/model/", "/optimizer/state/"
"""Prefixes of the keys of weights and of the optimizer's state."""


def save_shards(
    path: Path,
    header: Mapping[str, Any],
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parallel: Parallel,
) -> None:
    """Write the folder ``path``; all ranks take part.

    Raises:
        OSError: on every rank, if a write fails on one of them; there is then no such folder.
    """
    partial = path.parent / f".{path.name}{PARTIAL}"
    parallel.from_first(lambda: begin(partial))
    plain, tensors = split(state_of(model, optimizer))
    try:
        save(tensors, storage_writer=FileSystemWriter(partial), process_group=parallel.control)
        own = [*partial.glob(f"__{parallel.rank}_*"), *([partial / INDEX] if parallel.is_first else [])]
        sums = parallel.gather({file.name: checksum(file) for file in own})
        files = {name: value for part in sums for name, value in part.items()}
        parallel.from_first(lambda: finish(partial, path, {**header, "files": files, "plain": plain}))
    except (CheckpointException, OSError) as error:
        parallel.from_first(lambda: shutil.rmtree(partial, ignore_errors=True))
        for failure, _ in error.failures.values() if isinstance(error, CheckpointException) else ():
            if (number := error_number(failure)) is not None:
                raise OSError(number, os.strerror(number), str(path)) from error
        raise


def begin(partial: Path) -> None:
    with naming(partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)


def finish(partial: Path, path: Path, state: Mapping[str, Any]) -> None:
    write_atomically(partial / STATE_FILE, lambda file: torch.save(dict(state), file))
    if path.exists():
        # A checkpoint of this step that was refused when the run was resumed.
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    partial.rename(path)
    sync_directory(path.parent)


def damaged_part(path: Path, files: Mapping[str, int]) -> str | None:
    """The name of a missing or damaged file, if there is one."""
    for name, value in files.items():
        if not (path / name).is_file() or checksum(path / name) != value:
            return name
    return None


def load_shards(
    path: Path, plain: Any, *, model: nn.Module, optimizer: torch.optim.Optimizer, parallel: Parallel
) -> None:
    """Read an undamaged folder into a model and a new optimizer, whatever number of ranks has written it; ``plain`` is
    that entry of its ``state.pt``. All ranks take part.

    Raises:
        LabError: optimizer and checkpoint do not have the same tensors.
    """
    _, tensors = split(state_of(model, optimizer))
    reader = IndexReader(path)
    if foreign := sorted(reader.read_metadata().state_dict_metadata.keys() ^ tensors.keys()):
        raise LabError(
            f"checkpoint {str(path)!r} cannot be loaded: {type(optimizer).__name__} and it do not hold the same "
            f"tensors, {foreign[0]!r} is in one of them alone"
        )
    fill(tensors, reader, parallel)
    state = join(plain, tensors)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def read_tensors(path: Path, wanted: frozenset[str]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The whole weights in a folder, and its optimizer's state under the wanted keys, by parameter."""
    reader = IndexReader(path)
    tensors: dict[str, Tensor] = {}
    for place, entry in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)  # the reader has checked
        if place.startswith(WEIGHTS) or (place.startswith(STATE) and place.rpartition("/")[2] in wanted):
            tensors[place] = torch.empty(entry.size, dtype=entry.properties.dtype)
    fill(tensors, reader, ONE_PROCESS)
    weights = {place.removeprefix(WEIGHTS): tensor for place, tensor in tensors.items() if place.startswith(WEIGHTS)}
    moments: dict[str, dict[str, Tensor]] = {}
    for place, tensor in tensors.items():
        if place.startswith(STATE):
            name, _, key = place.removeprefix(STATE).rpartition("/")
            moments.setdefault(name, {})[key] = tensor
    return weights, moments


def fill(tensors: dict[str, Tensor], reader: "IndexReader", parallel: Parallel) -> None:
    """Read a checkpoint's tensors in place."""
    with warnings.catch_warnings():
        # torch warns that a single process reads the checkpoint, which is intended here.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(tensors, storage_reader=reader, process_group=parallel.control, no_dist=parallel.ranks == 1)


def load_whole(state: Mapping[str, Any], *, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the model and optimizer of one process's checkpoint into this rank's parts of them."""
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, state["model"], options=options)
    names = {parameter: name for name, parameter in model.named_parameters()}
    saved = state["optimizer"]
    groups, by_name = [], {}
    for own, group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        called = [names[parameter] for parameter in own["params"]]
        groups.append({**group, "params": called})
        for name, index in zip(called, group["params"], strict=True):
            if index in saved["state"]:
                by_name[name] = saved["state"][index]
    set_optimizer_state_dict(model, optimizer, {"state": by_name, "param_groups": groups}, options=options)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The sharded state of model and optimizer, by the names of parameters."""
    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}


def split(tree: Any, place: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Split a nested value into one with names in place of tensors, and the tensors by these names."""
    if isinstance(tree, Tensor):
        return place, {place: tree}
    if not isinstance(tree, dict | list | tuple):
        return tree, {}
    tensors: dict[str, Tensor] = {}
    plain = {}
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        plain[key], found = split(value, f"{place}/{key}")
        tensors |= found
    if isinstance(tree, dict):
        return plain, tensors
    return (list if isinstance(tree, list) else tuple)(plain.values()), tensors


def join(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`split`."""
    if isinstance(plain, str):
        return tensors.get(plain, plain)
    if isinstance(plain, dict):
        return {key: join(value, tensors) for key, value in plain.items()}
    if isinstance(plain, list | tuple):
        return (list if isinstance(plain, list) else tuple)(join(value, tensors) for value in plain)
    return plain


class IndexUnpickler(pickle.Unpickler):
    """Unpickles an index of tensors; other classes are refused."""

    CLASSES = frozenset(
        {
            *(("torch.distributed.checkpoint.metadata", name) for name in METADATA_CLASSES),
            *(("pathlib", name) for name in ("Path", "PosixPath", "WindowsPath")),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            ("torch", "Size"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        """The classes that an index is made of, and the dtypes of torch."""
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if (module, name) == ("builtins", "getattr"):
            return enum_member
        if (module, name) not in self.CLASSES:
            raise pickle.UnpicklingError(f"{module}.{name} is nothing that an index is made of")
        return super().find_class(module, name)


def enum_member(kind: Any, name: str) -> Enum:
    """Stands for ``getattr``, with which early releases of Python 3.11 pickle enum members."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f"{kind!r}.{name} is nothing that an index is made of")
    return kind[name]


class IndexReader(FileSystemReader):
    """Torch's reader, without the execution of code."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The index, which lists tensors and nothing else.

        Raises:
            pickle.UnpicklingError: it is something else.
        """
        with (Path(self.path) / INDEX).open("rb") as file:
            metadata = IndexUnpickler(file).load()
        entries = getattr(metadata, "state_dict_metadata", {}).values()
        if not isinstance(metadata, Metadata) or not all(isinstance(entry, TensorStorageMetadata) for entry in entries):
            raise pickle.UnpicklingError("it is no index of tensors")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
