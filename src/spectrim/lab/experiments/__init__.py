"""Several runs under equal conditions: comparisons, comparisons at equal time, sweeps, and their statistics.

May import: ``lab`` itself, ``recipes``, ``data``, ``logging``, ``training`` and ``reports`` (to write their reports).
"""
