"""The step of parameters that are DTensors: shards of whole matrices, on whatever mesh.

Entry-wise work runs on the shards by the same lists as in one process. What needs whole matrices brings them to owners,
which work on them and send the results back; Spectra's spike is shaped where it lies. Relies on
:mod:`spectrim.distributed` for every message.
"""
