"""Entry-wise operations over lists of tensors, and symmetric products, each in an eager and a Triton form.

Each module has the eager form of an operation, made of torch's fused and ``_foreach`` calls; it is the reference for
the Triton form in ``device``. ``choice`` decides which form runs. Nothing here depends on optimizers or reads the
device.

In all modules ``found`` is the skip flag: None, or a float32 scalar on the device that is 1 if the whole step is
skipped, so that no weight and no state changes, and 0 otherwise.
"""

from .choice import use

__all__ = ["use"]
