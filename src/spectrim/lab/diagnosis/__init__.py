"""The analysis behind ``spectrim spectrum``: spectra of weights, gradients, momentum and gradient noise.

May import: ``lab`` itself, ``recipes``, ``data``, ``models``, ``logging``, ``training`` and ``reports``.
"""
