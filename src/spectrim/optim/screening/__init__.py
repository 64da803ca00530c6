"""Checks before a step: are all gradients finite, and do all ranks take the same step.

``nonfinite`` decides whether to step, ``skips`` counts skipped steps, ``shard_screening`` combines the gradients'
checks over ranks, ``agreement`` compares options and parameters between ranks.

Imports ``stepping`` and ``sharded``.
"""
