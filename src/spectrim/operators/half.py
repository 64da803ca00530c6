"""TEMPORARY: replaced by the half-precision operators."""

from .clip import soft_clip
from .orthogonalize import orthogonalize


def half_clip(stacks, thresholds, *, overwrite=False):
    return [soft_clip(s, t) for s, t in zip(stacks, thresholds)]


def half_polar(stacks, *, steps=None, overwrite=False):
    return [orthogonalize(s, steps=steps) for s in stacks]


def half_clip_flops(m, n):
    return 1.0


def half_polar_flops(m, n, steps):
    return 1.0
