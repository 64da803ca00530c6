"""What a step does entry by entry, over whole lists of tensors, and symmetric products; each in two forms.

Each module has an operation in an eager form, made of torch's fused and ``_foreach`` calls: the reference of its Triton
form in ``device``. ``choice`` has the rule by which one of them runs. Nothing here knows of optimizers or groups, and
nothing reads the device.

Everywhere ``found`` is None, or a float32 scalar on the device that is exactly 1 where the whole step is to be skipped
and 0 otherwise: no weight and no state changes then.
"""

from .choice import use

__all__ = ["use"]
