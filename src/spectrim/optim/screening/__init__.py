"""Checks before a step: all gradients are finite, and all ranks take the same step.

``nonfinite`` decides if the step is taken, ``skips`` counts skipped steps, ``shard_screening`` combines the checks of
gradients over ranks, ``agreement`` compares options and parameters between ranks.

Imports ``stepping`` and ``sharded``.
"""
