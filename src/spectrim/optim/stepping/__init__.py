"""The step of parameters that are whole in this process.

``entries`` lists the parameters of a step, ``buckets`` stacks those of one rule and shape, ``step`` runs prepare,
direct, operate and apply on a bucket. ``shrinkage`` passes shrinkage to a kernel; ``narrow_state`` rounds bfloat16
state.

Imports ``grouping``, ``memory``, ``spectral`` and ``rules``.
"""
