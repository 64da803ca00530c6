"""What a step does entry by entry, over whole lists of tensors: screening, directions, shrinkage, updates.

Each module has one such operation in an eager form, made of torch's fused and ``_foreach`` calls, which is the
reference of the Triton form beside it. Nothing here knows of optimizers, groups or matrices. Nothing reads the device.

Everywhere ``found`` is None, or a float32 scalar on the device that is exactly 1 where the whole step is to be skipped
and 0 otherwise: no weight and no state changes then.
"""
