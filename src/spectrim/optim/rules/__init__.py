"""What one step does to the parameters of a group: the group's options, read once into a ``Rule``.

``recipe`` combines a base direction and a spectral operator, ``schedule`` computes clip thresholds over time, ``rule``
puts them together with a group's options.

Imports ``grouping``, ``directions`` and ``spectral``.
"""
