"""Tensors that say they are on a CUDA device, on a machine that has none: they have shapes and no numbers.

What is dispatched for them is counted as a device would see it: kernels that it launches, and operators after which a
host would wait. A list operator counts as one launch for every 30 tensors, a concatenation for every 64.
"""

import collections
import contextlib
import ctypes
import math
import pathlib

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Kernels of operators that launch several.
SEVERAL = {"linalg_cholesky_ex": 3, "linalg_solve_triangular": 2, "segment_reduce": 3, "topk": 4}
#: What launches nothing, though it is no view.
NOTHING = {
    "device",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "_unsafe_view",
    "alias",
    "lift_fresh",
}
#: After which the host has to wait.
WAITS = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "_linalg_check_errors",
    "_linalg_eigh",
    "_linalg_svd",
}


class Counter(TorchDispatchMode):
    """Counts, while it is entered: ``launches`` and ``waits`` by the operator's name."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[str] = collections.Counter()

    def clear(self) -> None:
        self.launches.clear()
        self.waits.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        found = 1.0 if name == "_local_scalar_dense" else func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
        if not any(x.device.type == "cuda" for x in given + made):
            return found
        crosses = any(x.device.type == "cpu" and x.ndim for x in given + made)
        blocking = not ((kwargs or {}).get("non_blocking") or (name == "copy_" and args[2:] == (True,)))
        if name in WAITS or (name in ("_to_copy", "copy_") and crosses and blocking):
            self.waits[name] += 1
        if not func.is_view and name not in NOTHING:
            size = len(args[0]) if args and isinstance(args[0], list | tuple) else 1
            each = {"cat": 64, "stack": 64}.get(name, 30)
            self.launches[name] += SEVERAL.get(name, 1) * math.ceil(size / each)
        return found


@contextlib.contextmanager
def counted():
    """Fake CUDA tensors can be made and computed with; gives the counter."""
    library = ctypes.CDLL(str(pathlib.Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 21).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[1]
    # A build without CUDA has no guard for it; that of the meta device does nothing, which is right for what is fake.
    guards[1] = before or guards[14]
    try:
        with FakeTensorMode(), Counter() as counter:
            yield counter
    finally:
        guards[1] = before
