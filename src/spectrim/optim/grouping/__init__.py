"""Param groups: the role, layout and options of every parameter.

``layout`` views a tensor as matrices. ``roles``, ``known_models`` and ``reading`` derive the role and layout of a
model's parameters, and ``groups`` has :func:`spectrim.param_groups`. ``options`` checks a group's options,
``flat_shards`` refuses parameters that a framework has flattened, ``missing_roles`` warns if embeddings would be
stepped as hidden matrices.

Imports :mod:`spectrim.operators`; nothing else of ``optim``.
"""
