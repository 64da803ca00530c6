"""Benchmarks of operators, of optimizer steps and of the training loop.

May import: ``lab`` itself, ``data``, ``models``, ``logging`` and ``training``.
"""
