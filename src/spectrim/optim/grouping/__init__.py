"""Param groups: what every parameter is, and which options apply to it.

``layout`` reads a tensor's storage as matrices. ``roles``, ``known_models`` and ``reading`` tell what a parameter of a
model is; ``groups`` has :func:`spectrim.param_groups`, which writes it into groups. ``options`` checks a group's
options, ``flat_shards`` refuses parameters that a framework has flattened, ``unsaid`` warns where embeddings would be
taken for hidden matrices.

Imports :mod:`spectrim.operators`; nothing else of ``optim``.
"""
