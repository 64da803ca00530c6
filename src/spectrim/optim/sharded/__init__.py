"""The step of sharded parameters (DTensors), on any mesh.

Entry-wise work runs on the shards, with the same functions as in one process. Matrices that an operator needs whole are
sent to owner ranks and back; Spectra's spike is shaped on the shards. ``entry`` describes a shard, ``rounds`` splits
the work into messages, ``shape`` applies operator, scale and clip, ``shard_step`` takes the step.

Imports ``grouping``, ``spectral``, ``rules`` and ``stepping``; all messages go through :mod:`spectrim.distributed`.
"""
