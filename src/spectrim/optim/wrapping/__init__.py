"""Spectral clipping around any torch optimizer: the base optimizer steps, and its update is clipped.

``probe`` and ``probe_shards`` measure how the base steps; ``wrapped_entry`` saves a weight during the base's step and
returns its update; ``base_updates`` clips and applies the update; ``wrapper`` has :class:`spectrim.SpectralClipping`.

Imports everything else in ``optim`` but the named optimizers.
"""
