"""What four ranks promise: bytes sent, bytes held, checkpoints for any number of ranks, and no hang over a fault."""

import functools
import math
import tempfile

import pytest
import torch
from torch import nn

import sharded_cases as cases
import sharded_workers
import worlds

RANKS = 4


@functools.cache
def results():
    folder = tempfile.mkdtemp()
    return worlds.run(RANKS, sharded_workers.on_four_ranks, folder), folder


def mean_sent(recipe, dtype, dim, purpose):
    found = [result["bytes"][recipe, dtype, dim] for result in results()[0]]
    return sum(size for sent in found for key, size in sent.items() if key.startswith(purpose)) / RANKS


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("recipe", ["adamw+clip", "muon", "around AdamW"])
def test_dense_methods_send_every_matrix_to_its_owner_and_back_and_no_more(recipe, dim):
    numbers = sum(m * n for m, n in sharded_workers.BYTES_SHAPES)
    bound = 8 * numbers * (RANKS - 1) / RANKS**2
    assert mean_sent(recipe, "float32", dim, "matrices") == bound
    if recipe != "around AdamW":  # which has no exchange_dtype
        assert mean_sent(recipe, "bfloat16", dim, "matrices") == bound / 2


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_sent_to_owners_and_back_as_they_are(dtype, dim):
    numbers = sum(m * n for m, n in sharded_workers.BYTES_SHAPES)
    width = 8 if dtype == "float32" else 4
    assert mean_sent("clip grad", dtype, dim, "matrices") == width * numbers * (RANKS - 1) / RANKS**2
    count = len(sharded_workers.BYTES_SHAPES)
    assert mean_sent("clip grad", dtype, dim, "") - mean_sent("clip grad", dtype, dim, "matrices") <= 2 * 8 * 4 * count
    assert mean_sent("shrink grad", dtype, dim, "") <= 2 * 8 * 5 * count


@pytest.mark.parametrize("dim", [0, 1])
def test_spectra_sends_a_few_columns_and_never_a_matrix(dim):
    shapes = sharded_workers.BYTES_SHAPES
    ranks = [round(0.25 * min(shape)) for shape in shapes]
    share = (RANKS - 1) / RANKS
    columns = sum(12 * k * max(shape) * share for k, shape in zip(ranks, shapes, strict=True))
    small = sum(2 * 8 * (2 * k * k + k + 2) * share for k in ranks)
    assert 0 < mean_sent("spectra", "float32", dim, "spike, columns") <= columns
    assert mean_sent("spectra", "float32", dim, "spike, small sums") <= small
    assert mean_sent("spectra", "float32", dim, "matrices") == 0


def test_ranks_whose_experts_have_no_spike_send_the_messages_of_those_whose_experts_have_one():
    assert max(worlds.run(RANKS, sharded_workers.experts_of_unlike_spectra)) < 1e-5


def test_entrywise_methods_send_a_few_numbers_for_each_matrix():
    count = len(sharded_workers.BYTES_SHAPES)
    assert mean_sent("adamw", "float32", 0, "") <= 2 * 8 * (3 * count + 6)
    assert mean_sent("adamw+shrink", "float32", 0, "") <= 2 * 8 * (4 * count + 6)


def test_spectra_holds_half_of_adamws_state_on_every_rank():
    assert all(0.5 < result["state"] <= 0.51 for result in results()[0])


@pytest.mark.parametrize("recipe", ["adamw+clip", "spectra", "adamw+shrink", "around AdamW"])
def test_a_gradient_that_is_bad_or_missing_on_one_rank_is_one_decision_for_all(recipe):
    for result in results()[0]:
        moved, steps, skipped = result["faults"][recipe]
        assert {name for name, found in moved.items() if not found} == {"tall"}
        assert {name: count for name, count in steps.items() if count != 2} == {"tall": 1}
        assert skipped == {"wide": 1}


def without_missing_rows(name):
    """A gradient of which rank 1 has nothing."""
    grad = cases.gradient(name, 1)
    rows = -(-len(grad) // RANKS)
    grad[rows : 2 * rows] = 0
    return grad


@pytest.mark.parametrize("reading", ["read", "unread"])
@pytest.mark.parametrize("utility", cases.UTILITIES)
def test_a_bad_gradient_is_left_alone_and_a_missing_shard_is_zeros(utility, reading):
    for rank, result in enumerate(results()[0]):
        key = utility if reading == "read" else (reading, utility)
        before, after, numbers, kept = result["gradient faults"][key]
        names = [name for group in cases.GROUPS for name in group["names"] if name in before]
        assert kept
        assert all(len(found) == len(names) for found in numbers)
        torch.testing.assert_close(after["wide"], before["wide"], rtol=0, atol=0, equal_nan=True)
        whole = {name: nn.Parameter(torch.zeros(cases.SHAPES[name])) for name in [*names, "uneven"] if name != "wide"}
        for name, parameter in whole.items():
            parameter.grad = without_missing_rows(name) if name == "uneven" else cases.gradient(name, 1)
        expected = cases.UTILITIES[utility](cases.groups(whole))
        for name, local in after.items():
            if name != "wide":
                rows = -(-len(whole[name].grad) // RANKS)
                torch.testing.assert_close(local, whole[name].grad[rows * rank : rows * (rank + 1)], atol=1e-5, rtol=0)
        found = [dict(zip(names, each.tolist(), strict=True)) for each in numbers]
        order = [name for group in cases.GROUPS for name in group["names"] if name in whole]
        for mine, its in zip(found, expected, strict=True):
            bad = mine.pop("wide")
            assert bad == (0.0 if utility == "shrink" else math.inf)
            right = dict(zip(order, its.tolist(), strict=True))
            assert mine == pytest.approx({name: right[name] for name in mine}, rel=1e-4, abs=1e-6)


def test_a_gradient_that_is_bad_on_one_rank_raises_on_all():
    for rank, result in enumerate(results()[0]):
        for utility in ("clip_grads", "shrink_grad_"):
            raised, untouched = result["gradient faults"]["raised", utility]
            assert "the gradient of 'plain' is not finite" in raised or rank != 3
            assert "a gradient of another rank is not finite" in raised or rank == 3
            assert untouched
        # Rank 3 reaches rank 0 by the row of one of them.
        assert "is not finite" in result["gradient faults"]["crossing"]
        # Without one of its replicas a gradient counts as not finite.
        assert result["gradient faults"]["some replicas"] == ([math.inf] if rank else [])


def test_a_gradient_in_parts_is_summed_before_it_is_clipped():
    parameter = nn.Parameter(torch.zeros(cases.SHAPES["wide"]))
    parameter.grad = cases.gradient("wide", 0) * 10
    expected = sharded_workers.clip_grads([parameter])
    for result in results()[0]:
        norms, grad = result["gradient faults"]["partial"]
        torch.testing.assert_close(norms, expected)
        torch.testing.assert_close(grad, parameter.grad)


def test_raising_is_for_every_rank_and_replicas_that_differ_stay():
    for rank, result in enumerate(results()[0]):
        for alone, shared in result["faults"]["raised"].values():
            assert ("the gradient of plain" if rank == 2 else "a gradient of another rank") in alone
            assert "the gradient of fused" in shared
        assert result["faults"]["some replicas"] == [(True, {"wide": 1})] * 2


def test_bases_that_step_shards_otherwise_than_the_whole_are_refused_by_name():
    for result in results()[0]:
        refused = result["faults"]["refused"]
        # Adafactor's root mean square is silently that of a shard; Rprop's indexing fails.
        assert (
            "cannot wrap Adafactor: its step on shards differs from its step on the whole tensor ('bias', "
            in refused["Adafactor"]
        )
        assert "cannot wrap Rprop: its step on shards failed with " in refused["Rprop"]


def test_fused_projections_in_bfloat16_step_as_a_whole():
    for result in results()[0]:
        assert torch.equal(*result["narrow"])


def test_ranks_that_disagree_are_told_in_what():
    for result in results()[0]:
        first, later = result["disagreement"]
        assert "clip of group 0: 1.0 on ranks 0, 1, 2; 2.0 on ranks 3" in first
        assert "lr of group 2: 0.5 on ranks 0" in later


@pytest.mark.parametrize("kind", ["sharded", "full", "sharded, wrapped"])
def test_state_dicts_of_either_kind_carry_a_run_on_bit_for_bit(kind):
    options = results()[0][0]["options"]
    for name, tensor in options["straight, wrapped" if "wrapped" in kind else "straight"].items():
        assert torch.equal(options[kind][name], tensor), name


@pytest.mark.parametrize("world", [1, 2])
def test_what_four_ranks_saved_fewer_go_on_with(world):
    (first, *_), folder = results()
    for name, tensor in worlds.run(world, sharded_workers.resumed, world, folder)[0].items():
        torch.testing.assert_close(tensor, first["options"]["straight"][name], rtol=1e-4, atol=1e-5)
