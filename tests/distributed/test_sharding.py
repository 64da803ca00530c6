"""Who holds what, from placements alone, against torch's own shards of a tensor in a world of fake processes."""

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from spectrim.distributed.grid import Axes, Rows, basis_sharding, grid_of
from spectrim.distributed.intervals import count, flattened, overlaps, put, take
from spectrim.distributed.owners import owners
from spectrim.distributed.sharding import sharding_from
from spectrim.optim.sharded.entry import axes_of

CASES = [
    ((7, 5), (4,), (Shard(0),)),
    ((2, 5), (4,), (Shard(0),)),
    ((7, 5), (2, 2), (Shard(0), Shard(1))),
    ((9, 3), (2, 2), (Shard(0), Shard(0))),
    ((8, 4), (2, 2), (_StridedShard(0, split_factor=2), Shard(0))),
    ((7, 4), (2, 2), (_StridedShard(0, split_factor=2), Shard(0))),
    ((4, 6, 5), (2, 3), (Replicate(), Shard(1))),
    ((4, 6, 5), (2, 2), (Shard(-1), Shard(0))),
]


def torch_shard(tensor, mesh_shape, placements, coordinate):
    """torch's shard, one mesh dimension after the other from the left, as distribute_tensor does it."""
    for size, placement, place in zip(mesh_shape, placements, coordinate, strict=True):
        if not placement.is_replicate():
            dim = placement.dim % tensor.ndim
            placement = type(placement)(dim, **({"split_factor": 2} if isinstance(placement, _StridedShard) else {}))
            tensor = placement._split_tensor(tensor, size, with_padding=False)[0][place]
    return tensor


@pytest.mark.parametrize(("shape", "mesh_shape", "placements"), CASES)
def test_regions_are_the_shards_that_torch_makes(shape, mesh_shape, placements):
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    sharding = sharding_from(shape, mesh_shape, placements, "w")
    again = torch.full_like(whole, -1)
    for member in range(sharding.members):
        shard = torch_shard(whole, mesh_shape, placements, sharding.coordinate(member))
        assert torch.equal(take(whole, sharding.region(member)), shard)
        assert tuple(count(runs) for runs in sharding.region(member)) == tuple(shard.shape)
        put(again, sharding.region(member), shard)
    assert torch.equal(again, whole)


@pytest.mark.parametrize(
    ("placements", "message"),
    [
        ((Partial(), Shard(0)), r"parameter 'layers.0.w'.*Partial.*expected Shard or Replicate"),
        ((_StridedShard(0, split_factor=3), Shard(0)), r"'layers.0.w'.*split_factor=3: expected 2"),
    ],
)
def test_a_layout_that_is_not_served_is_refused_by_name(placements, message):
    with pytest.raises(ValueError, match=message):
        sharding_from((8, 4), (2, 2), placements, "layers.0.w")


def test_a_strided_layout_on_which_torch_contradicts_itself_is_refused():
    with pytest.raises(ValueError, match=r"'w'.*FSDP2 and DTensor disagree"):
        sharding_from((9, 4), (4, 2), (_StridedShard(0, split_factor=2), Shard(0)), "w")


def test_runs_overlap_join_and_flatten_as_sets_do():
    mine, other = ((0, 3), (5, 9)), ((2, 6), (8, 12))
    indices = [list(range(a, b)) for a, b in mine + other]
    a, b = indices[0] + indices[1], indices[2] + indices[3]
    common = [(a[i], b[j]) for x, y in overlaps(mine, other) for i, j in zip(range(100)[x], range(100)[y], strict=True)]
    assert common == [(i, i) for i in a if i in b]
    grid = torch.arange(24).view(4, 6)
    region = (((1, 3),), ((0, 2), (4, 6)))
    flat = flattened(region, (4, 6))
    assert torch.equal(take(grid.view(-1), [flat]), take(grid, region).reshape(-1))


def test_a_basis_is_kept_once_and_evenly_over_all_ranks_of_a_replica():
    sharding = sharding_from((24, 16), (2, 2), (Shard(0), Shard(1)), "w")
    grid = grid_of(sharding, Axes((0,), (1,)), Rows(0, 24))
    kept = [grid.basis(member) for member in range(4)]
    assert [count(runs) for runs in kept] == [4, 4, 4, 4]
    assert sorted(run for runs in kept for run in runs) == [(0, 4), (4, 8), (8, 12), (12, 16)]


def test_owners_share_the_work_of_a_whole_step():
    first, loads = owners([8**3, 40**3, 8**3], (), 4)
    assert first[1] == 0  # the largest goes first
    second, loads = owners([20**3] * 6, loads, 4)
    assert 0 not in second  # whose hands are full from the round before
    assert sum(loads) == 2 * 8**3 + 40**3 + 6 * 20**3
    assert max(loads) == 40**3


@pytest.mark.parametrize("placements", [(_StridedShard(0, split_factor=2), Shard(0)), (Shard(1), Shard(0))])
def test_a_rank_has_the_bases_of_the_experts_that_it_has(placements):
    sharding = sharding_from((8, 6, 4), (2, 2), placements, "experts")
    basis = basis_sharding(sharding, axes_of("stack", 3), 3)
    assert basis.shape == (8, 4, 3)
    for member in range(4):
        assert basis.region(member)[0] == sharding.region(member)[0]
