"""What four ranks promise: bytes sent, bytes held, checkpoints for any number of ranks, and no hang over a fault."""

import functools
import tempfile

import pytest
import torch

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
@pytest.mark.parametrize("recipe", ["adamw+clip", "muon"])
def test_dense_methods_send_every_matrix_to_its_owner_and_back_and_no_more(recipe, dim):
    numbers = sum(m * n for m, n in sharded_workers.BYTES_SHAPES)
    bound = 8 * numbers * (RANKS - 1) / RANKS**2
    assert mean_sent(recipe, "float32", dim, "matrices") == bound
    assert mean_sent(recipe, "bfloat16", dim, "matrices") == bound / 2


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


def test_entrywise_methods_send_a_few_numbers_for_each_matrix():
    count = len(sharded_workers.BYTES_SHAPES)
    assert mean_sent("adamw", "float32", 0, "") <= 2 * 8 * (3 * count + 6)
    assert mean_sent("adamw+shrink", "float32", 0, "") <= 2 * 8 * (4 * count + 6)


def test_spectra_holds_half_of_adamws_state_on_every_rank():
    assert all(0.5 < result["state"] <= 0.51 for result in results()[0])


@pytest.mark.parametrize("recipe", ["adamw+clip", "spectra", "adamw+shrink"])
def test_a_gradient_that_is_bad_or_missing_on_one_rank_is_one_decision_for_all(recipe):
    for result in results()[0]:
        moved, steps, skipped = result["faults"][recipe]
        assert {name for name, found in moved.items() if not found} == {"wide", "tall"}
        assert {name: count for name, count in steps.items() if count != 2} == {"wide": 1, "tall": 1}
        assert skipped == {"wide": 1}


def test_raising_is_for_every_rank_and_replicas_that_differ_stay():
    for result in results()[0]:
        assert "'fused'" in result["faults"]["raised"] or "fused" in result["faults"]["raised"]
        assert result["faults"]["some replicas"] == (True, {"wide": 1})


def test_what_does_not_serve_sharded_parameters_refuses_them_by_name():
    for result in results()[0]:
        assert all("wide" in found for found in result["faults"]["refused"])


def test_ranks_that_disagree_are_told_in_what():
    for result in results()[0]:
        first, later = result["disagreement"]
        assert "clip of group 0: 1.0 on ranks 0, 1, 2; 2.0 on ranks 3" in first
        assert "lr of group 2: 0.5 on ranks 0" in later


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_state_dicts_of_either_kind_carry_a_run_on_bit_for_bit(kind):
    options = results()[0][0]["options"]
    for name, tensor in options["straight"].items():
        assert torch.equal(options[kind][name], tensor), name


@pytest.mark.parametrize("world", [1, 2])
def test_what_four_ranks_saved_fewer_go_on_with(world):
    (first, *_), folder = results()
    for name, tensor in worlds.run(world, sharded_workers.resumed, world, folder)[0].items():
        torch.testing.assert_close(tensor, first["options"]["straight"][name], rtol=1e-4, atol=1e-5)
