"""Sharded matrices: which part of each is where, batched reductions, and the way to owners and back.

Nothing here knows an optimizer. :mod:`sharding` says who holds what, from placements alone; :mod:`collectives` is the
only module that sends anything; :mod:`owners` and :mod:`spike` are the two ways in which whole-matrix work gets done.
"""
