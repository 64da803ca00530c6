"""Spectral operators as objects: numbers, state, the work on whole matrices and on shards, cost and label.

One class a module, each named like the pure function of :mod:`spectrim.operators` that it calls (``clip``,
``orthogonalize``, ``spike``). A recipe names one; the rest of ``optim`` sees the base class alone.

Imports ``grouping``, ``directions`` and ``memory``.
"""
