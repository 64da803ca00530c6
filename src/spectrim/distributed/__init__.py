"""Sharded matrices: which rank holds what, batched reductions, and gathering matrices at owner ranks.

Nothing here depends on optimizers. :mod:`sharding` describes shards by their placements; :mod:`collectives` is the only
module that sends messages; :mod:`owners` gathers whole matrices, and :mod:`spike` shapes spikes without gathering.
"""
