"""Triton kernels as torch operators. These modules import Triton, so they are imported when a kernel first runs."""
