"""Spectral operators as objects with options and state, which call the pure functions of :mod:`spectrim.operators`.

``clip``, ``orthogonalize`` and ``spike`` have one operator each. A recipe names an operator; the rest of ``optim`` uses
the base class only.

Imports ``grouping``, ``directions`` and ``memory``.
"""
