"""Clipping and shrinking gradients in place, for training loops around any optimizer.

``in_place`` has the public functions, ``shard_gradients`` the same for sharded gradients; ``matrices`` and ``norms``
are what both need.

Imports ``grouping``, ``rules``, ``spectral``, ``stepping``, ``sharded`` and ``screening``.
"""
