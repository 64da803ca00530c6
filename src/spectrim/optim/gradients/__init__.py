"""Clipping and shrinking gradients in place, for training loops around any optimizer.

``in_place`` has the public functions and ``shard_gradients`` their work on sharded gradients; both use ``matrices``.

Imports ``grouping``, ``rules``, ``spectral``, ``stepping``, ``sharded`` and ``screening``.
"""
