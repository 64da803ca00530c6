"""Rules: the options of a param group, read once per step.

``schedule`` computes clip thresholds over time, ``rule`` combines a recipe, a base direction and a spectral operator,
with a group's options.

Imports ``grouping``, ``directions`` and ``spectral``.
"""
