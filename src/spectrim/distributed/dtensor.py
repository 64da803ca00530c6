"""Recognises and makes DTensors. They are imported on demand, since that takes half a second."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import Parameter
from typing_extensions import TypeIs

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

__all__ = ["dtensor_of", "is_dtensor"]


def is_dtensor(value: object) -> TypeIs[DTensor]:
    """True for a DTensor, whether it is a parameter or not."""
    if type(value) is Tensor or type(value) is Parameter:
        return False
    known = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return known is not None and isinstance(value, known)


def dtensor_of(local: Tensor, whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """This rank's shard as a DTensor with the shape and strides of ``whole``, such as a tensor on the meta device."""
    from torch.distributed.tensor import DTensor

    shape, stride = whole.shape, whole.stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
