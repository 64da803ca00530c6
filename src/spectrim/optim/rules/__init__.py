"""Rules: the options of a param group, read once per step.

``recipe`` combines a base direction and a spectral operator, ``schedule`` computes clip thresholds over time, ``rule``
combines both with a group's options.

Imports ``grouping``, ``directions`` and ``spectral``.
"""
