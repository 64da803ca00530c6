"""A monitor of sharded parameters writes what a monitor of one process does, and on the first rank only."""

import functools
import json

import pytest

import monitor_workers
import worlds


@functools.cache
def results(world: int):
    return [json.loads(found) for found in worlds.run(world, monitor_workers.everything, world)]


@functools.cache
def expected(name: str):
    one = monitor_workers.plain if name in ("DDP", "FSDP2", "tensor parallel") else monitor_workers.given_plain
    return one()


CASES = [(2, name) for name in (*monitor_workers.LAYOUTS[2], "DDP", "FSDP2", "tensor parallel")]
CASES += [(4, name) for name in monitor_workers.LAYOUTS[4]]


@pytest.mark.parametrize(("world", "name"), CASES)
def test_many_processes_record_what_one_does(world, name):
    first, *others = results(world)
    records, wanted = first[name], expected(name)
    assert all(not other[name] for other in others)
    assert [record["step"] for record in records] == [record["step"] for record in wanted]
    for record, reference in zip(records, wanted, strict=True):
        assert record["skipped"] == reference["skipped"]
        assert record["parameters"].keys() == reference["parameters"].keys()
        for matrix, entry in reference["parameters"].items():
            assert record["parameters"][matrix].keys() == entry.keys()
            for quantity, value in entry.items():
                got = record["parameters"][matrix][quantity]
                assert got == pytest.approx(value, rel=3e-5), (record["step"], matrix, quantity)
        assert record.get("watched", {}) == pytest.approx(reference.get("watched", {}), rel=1e-5)
        assert record.get("spectra", {}).keys() == reference.get("spectra", {}).keys()
        for matrix, kinds in reference.get("spectra", {}).items():
            for kind, sigma in kinds.items():
                got = record["spectra"][matrix][kind]
                assert got == pytest.approx(sigma, rel=1e-3, abs=1e-5 * sigma[0]), (matrix, kind)


def test_a_sample_of_all_entries_is_the_root_mean_square_itself():
    for record in expected("fsdp"):
        exact = {name: entry["update_rms"] for name, entry in record["parameters"].items()}
        assert record["watched"] == pytest.approx(exact, rel=1e-5)
