"""Optimizer state: ``parameter_state`` creates it, ``loading`` reads it from a state dict.

Imports ``grouping``, ``directions``, ``rules``, ``stepping`` and ``sharded``.
"""
