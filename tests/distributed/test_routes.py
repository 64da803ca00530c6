"""Planned exchanges, every rank of a mesh played in one process, against taking shards apart and adding them up."""

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import spectrim
from spectrim.distributed.collectives import Team, team_of
from spectrim.distributed.copies import Copy, copies_of_region, copy_all, merged
from spectrim.distributed.grid import Axes, Rows, grid_of
from spectrim.distributed.intervals import count, take
from spectrim.distributed.owners import owners, plan_owners
from spectrim.distributed.sharding import Sharding, Split
from spectrim.distributed.spike import plan_rows

MESHES = st.sampled_from([(1,), (2,), (5,), (2, 2), (2, 3), (3, 2), (2, 2, 2)])


@st.composite
def shardings(draw, mesh, dimensions=(2, 3)):
    many = draw(st.sampled_from(dimensions))
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=many, max_size=many)))
    splits = [draw(st.one_of(st.none(), st.builds(Split, st.integers(0, many - 1)))) for _ in mesh]
    strided = [axis for axis in range(len(mesh) - 1) if splits[axis] and splits[axis] == splits[axis + 1]]
    if strided and draw(st.booleans()):
        # FSDP2 over tensor parallelism: rows that later dimensions have split already.
        axis = strided[0]
        later = [
            size for size, split in zip(mesh[axis + 1 :], splits[axis + 1 :], strict=True) if split == splits[axis]
        ]
        splits[axis] = Split(splits[axis].dim, math.prod(later))
    return Sharding(shape, mesh, tuple(splits))


@st.composite
def exchanges(draw):
    mesh = draw(MESHES)
    found = draw(st.lists(shardings(mesh), min_size=1, max_size=4))
    stacked = tuple((sharding, len(sharding.shape) == 3 and draw(st.booleans())) for sharding in found)
    order = draw(st.permutations(range(math.prod(mesh))))
    before = tuple(draw(st.lists(st.integers(1, 50), max_size=math.prod(mesh))))
    return stacked, before, tuple(order)


def numbered(shape):
    return torch.arange(1.0, math.prod(shape) + 1).view(shape)


def travel(routes, order, tensors, targets):
    """An all-to-all of what every member's route packs, by the sizes that both sides name."""
    messages = [route.pack(own, torch.float32, torch.device("cpu")) for route, own in zip(routes, tensors, strict=True)]
    parts = [torch.split(message, route.sent) for message, route in zip(messages, routes, strict=True)]
    members = sorted(range(len(order)), key=order.__getitem__)
    for member, route in enumerate(routes):
        arriving = [parts[sender][order[member]] for sender in members]
        assert [len(part) for part in arriving] == route.received
        assert route.sent[order[member]] == 0
        route.unpack(torch.cat(arriving), tensors[member], targets[member])


def reference_owners(works, before, members):
    loads = [*before, *([0] * (members - len(before)))]
    chosen = {}
    for index in sorted(range(len(works)), key=lambda i: -works[i]):
        chosen[index] = loads.index(min(loads))
        loads[chosen[index]] += works[index]
    return [chosen[index] for index in range(len(works))], loads


@given(st.lists(st.integers(1, 9), max_size=20), st.lists(st.integers(1, 9), max_size=6), st.integers(6, 9))
def test_owners_are_those_of_least_work_whatever_keeps_count(works, before, members):
    chosen, after = owners(works, tuple(before), members)
    expected, loads = reference_owners(works, before, members)
    assert chosen == expected
    assert list(after) == loads[: len(after)]
    assert not any(loads[len(after) :])


@given(exchanges())
def test_shards_become_whole_at_owners_and_come_back(case):
    tensors, before, order = case
    members = range(len(order))
    plans = [plan_owners(tensors, before, order, me) for me in members]
    wholes = [numbered(sharding.shape) for sharding, _ in tensors]
    locals_ = [
        [take(whole, sharding.region(me)).contiguous() for whole, (sharding, _) in zip(wholes, tensors, strict=True)]
        for me in members
    ]
    at_owners = [[torch.full(plan.units[n].shape, math.nan) for n in plan.owned] for plan in plans]
    travel([plan.there for plan in plans], order, locals_, at_owners)
    for plan, found in zip(plans, at_owners, strict=True):
        assert plan.units == plans[0].units
        assert plan.loads == plans[0].loads
        for number, unit in zip(plan.owned, found, strict=True):
            tensor, index = plan.units[number].tensor, plan.units[number].index
            assert torch.equal(unit, wholes[tensor] if index is None else wholes[tensor][index])
    assert sorted(itertools.chain(*(plan.owned for plan in plans))) == list(range(len(plans[0].units)))
    back = [[torch.full_like(tensor, math.nan) for tensor in some] for some in locals_]
    travel([plan.back for plan in plans], order, [[-unit for unit in some] for some in at_owners], back)
    for found, expected in zip(back, locals_, strict=True):
        assert all(torch.equal(one, -other) for one, other in zip(found, expected, strict=True))


@given(exchanges())
def test_nothing_is_sent_but_what_others_need(case):
    tensors, before, order = case
    members = range(len(order))
    plans = [plan_owners(tensors, before, order, me) for me in members]
    there, back = [0] * len(order), [0] * len(order)
    for owner, plan in enumerate(plans):
        for number in plan.owned:
            unit = plan.units[number]
            sharding = tensors[unit.tensor][0]
            for member in members:
                region = sharding.region(member)
                part = take(numbered(sharding.shape), region)
                if unit.index is not None:
                    held = [index for start, stop in region[0] for index in range(start, stop)]
                    part = part[held.index(unit.index)] if unit.index in held else part[:0]
                if member != owner:
                    there[member] += part.numel() * (sharding.replica(member) == sharding.replica(owner))
                    back[owner] += part.numel()
    assert [plan.there.total_sent for plan in plans] == there
    assert [plan.back.total_sent for plan in plans] == back


@st.composite
def followed(draw):
    mesh = draw(MESHES)
    cases = []
    for sharding in draw(st.lists(shardings(mesh), min_size=1, max_size=3)):
        stack = len(sharding.shape) == 3 and draw(st.booleans())
        axes = Axes((1,), (2,), 0) if stack else Axes((0,), tuple(range(1, len(sharding.shape))))
        rows = sharding.shape[axes.rows[0]]
        # A part of all rows, or of every few of them.
        period = draw(st.sampled_from([None, *(size for size in range(1, rows) if rows % size == 0)]))
        stop = period or rows
        part = Rows(draw(st.integers(0, stop - 1)), stop, period)
        cases.append((grid_of(sharding, axes, part), draw(st.integers(1, 3))))
    return cases, tuple(draw(st.permutations(range(math.prod(mesh)))))


@given(
    followed(),
    st.sampled_from([("basis", "columns"), ("rows", "frame"), ("frame", "rows"), ("columns", "basis")]),
)
def test_rows_of_the_spike_reach_those_who_want_them(case, way):
    (cases, order), (have, want) = case, way
    summed = have in ("rows", "columns")
    members = range(len(order))
    sizes, tensors, plans, targets = [], [], [], []
    for me in members:
        some = [(grid, *((count(grid.stack(me)),) if grid.depth else ()), k) for grid, k in cases]
        sizes.append(some)
        tensors.append([part(grid, k, have, me) * (me + 1 if summed else 1) for grid, k in cases])
        plans.append(plan_rows(Team(None, order, me), some, have, want, summed=summed))
        targets.append([torch.zeros(shape) for shape in plans[-1][1]])
    travel([route for route, _ in plans], order, tensors, targets)
    for me in members:
        for (grid, k), target in zip(cases, targets[me], strict=True):
            expected = part(grid, k, want, me)
            if summed:
                target = target.sum(0)
                shares = torch.zeros_like(expected)
                for member in grid.family(me):
                    theirs = torch.zeros(length(grid, have))
                    for start, stop in grid.share(have)(member):
                        theirs[start:stop] = member + 1
                    shares += take(theirs, [grid.share(want)(me)])[:, None]
                expected = expected * shares
            assert torch.equal(target, expected)


def length(grid, which):
    return grid.shape[1] if which in ("columns", "basis") else grid.shape[0]


def part(grid, k, which, member):
    """A member's share of numbers that are the same for a whole matrix."""
    whole = numbered((*((grid.depth,) if grid.depth else ()), length(grid, which), k))
    stack = [grid.stack(member)] if grid.depth else []
    return take(whole, [*stack, grid.share(which)(member), ((0, k),)]).contiguous()


def test_even_pieces_are_few_copies_whatever_their_number():
    for ranks in (4, 64):
        rows = [Copy((2, 3), (3, 1), (3, 1), 6 * rank, 12 * rank) for rank in range(ranks)]
        blocks = [
            copy.moved(target=100 * index)
            for index in range(ranks)
            for copy in copies_of_region((2 * ranks, 3), [((2 * index, 2 * index + 2),), ((0, 3),)])
        ]
        replicas = [copy.moved(target=1000 * ranks * replica) for replica in range(3) for copy in blocks]
        assert [len(merged(copies)) for copies in (rows, blocks, replicas)] == [1, 1, 1]
        source = torch.randn(12 * ranks)
        found, expected = torch.zeros(3000 * ranks), torch.zeros(3000 * ranks)
        copy_all([(source, found, copy) for copy in merged(replicas)])
        copy_all([(source, expected, copy) for copy in replicas])
        assert torch.equal(found, expected)


# -- Host work ---------------------------------------------------------------------------------------------------------


def events(function):
    """How often a call enters functions of spectrim, goes on with generators of it, or leaves it for C.

    What torch does for weights without memory, it does in Python, by cases of their shapes.
    """
    found, source = 0, str(Path(spectrim.__file__).parent)

    def profile(frame, event, _):
        nonlocal found
        found += event in ("call", "c_call") and frame.f_code.co_filename.startswith(source)

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


def events_of_a_step(make, ranks, monkeypatch, replicas=1):
    """The host's work in a later step of the first of many ranks, on weights without memory in a fake world."""
    monkeypatch.setattr(Team, "gather_objects", lambda team, value: [value] * team.size)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        shape = (ranks,) if replicas == 1 else (replicas, ranks // replicas)
        mesh, placements = init_device_mesh("meta", shape), [*[Replicate()] * (len(shape) - 1), Shard(0)]
        parameters = []
        for size in [(2048, 32), (2048, 16), (1024, 32), (64, 4096), (2048,)]:
            local = torch.empty(-(-size[0] // shape[-1]), *size[1:], device="meta")
            stride = torch.empty(size, device="meta").stride()
            whole = DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(size), stride=stride)
            parameters.append(nn.Parameter(whole))
        roles = [{"params": parameters[:-1], "role": "matrix"}, {"params": parameters[-1:], "role": "vector"}]
        optimizer = make(roles)
        found = 0
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            found = events(optimizer.step)
        assert team_of(mesh) is team_of(mesh)
        return found
    finally:
        dist.destroy_process_group()


RECIPES = {
    "adamw+clip": lambda groups: spectrim.AdamW(groups, lr=1e-3, clip=1.0, clip_scope="all"),
    "spectra": lambda groups: spectrim.Spectra(groups, lr=1e-3),
}


@pytest.mark.parametrize("replicas", [1, 8])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_host_does_the_same_work_among_many_ranks_as_among_few(recipe, replicas, monkeypatch):
    few, many = (events_of_a_step(RECIPES[recipe], ranks, monkeypatch, replicas) for ranks in (64, 1024))
    # Where shards become empty a message falls into a few more runs; one more for each rank would be thousands.
    assert many <= 1.03 * few
