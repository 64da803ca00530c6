"""The step of parameters that are whole in this process.

``entries`` lists the parameters of a step and ``buckets`` stacks those of one rule and shape. ``step`` prepares
gradients, computes directions and applies updates; ``operate`` applies operator, scale and clip; ``shrinkage`` passes
shrinkage to a kernel; ``narrow_state`` rounds bfloat16 state.

Imports ``grouping``, ``memory``, ``spectral`` and ``rules``.
"""
