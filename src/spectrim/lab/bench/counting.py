"""Counts the arithmetic and the memory traffic of torch operations."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["Counter"]

DECOMPOSITIONS: dict[str, Callable[[int, int], float]] = {
    "linalg_cholesky_ex": lambda m, n: n**3 / 3,
    "cholesky_inverse": lambda m, n: 2 * n**3 / 3,
    "linalg_qr": lambda m, n: 4 * m * min(m, n) ** 2 - 4 * min(m, n) ** 3 / 3,
    "_linalg_eigh": lambda m, n: 9 * n**3,
}


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating-point operations of products and decompositions, and bytes that operations read and write.

    Decompositions by LAPACK's conventional counts: Cholesky n³/3, its inverse 2n³/3, QR 4mk² − 4k³/3, symmetric
    eigenvectors 9n³. Every operation that is not a view reads its arguments and writes its results once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0.0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation and run it."""
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if func.is_view or name == "_unsafe_view":
            return out
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, out))
        self.bytes += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        elif name == "mkldnn::_linear_pointwise":
            self.flops += 2 * args[0].numel() * args[1].shape[0]
        elif name in DECOMPOSITIONS:
            *stack, m, n = args[0].shape
            self.flops += math.prod(stack) * DECOMPOSITIONS[name](m, n)
        return out
