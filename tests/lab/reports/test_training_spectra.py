"""Spectra through training on a report page: what its figures hold of the monitor's records."""

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from monitor_records import parameter_names, record
from spectrim.lab.logging.monitor_log import MonitoredRun, layer_of, short_names
from spectrim.lab.reports.page.html import Figure
from spectrim.lab.reports.page.menu_figures import POINTS, thinned
from spectrim.lab.reports.page.quantities import axis_of
from spectrim.lab.reports.page.training_spectra import spectra_section

NAMES = parameter_names(2)
EXACT = ["model.layers.1.mlp.up_proj.weight"]


def course(steps: list[int], index: int = 0, **more: Any) -> MonitoredRun:
    records = [record(step, NAMES, exact=EXACT if step % 20 == 0 else None, seed=index, **more) for step in steps]
    return MonitoredRun(name=f"recipe {index}", index=index, records=records)


def figures(*courses: MonitoredRun) -> dict[str, Figure]:
    section = spectra_section(courses)
    assert section is not None
    return {item.title: item for item in section.items if isinstance(item, Figure)}


def test_runs_without_a_monitor_have_no_section() -> None:
    assert spectra_section([MonitoredRun(name="adamw", index=0, records=[])]) is None


@pytest.mark.parametrize("count", [1, 2, 47, 192, 4096])
def test_a_spectrum_is_thinned_evenly_and_keeps_its_ends(count: int) -> None:
    values = [1 / rank for rank in range(1, count + 1)]
    ranks, kept = thinned(values)
    assert (ranks[0], ranks[-1]) == (1, count)
    assert len(ranks) <= POINTS
    assert kept == [pytest.approx(1 / rank, rel=1e-3) for rank in ranks]
    assert all(later / earlier < 2.1 for earlier, later in pairwise(ranks))


def test_every_stage_matrix_and_kind_has_its_curves() -> None:
    runs = [course([20, 40], index) for index in (0, 1)]
    choices = figures(*runs)["Singular values through training"].choices
    assert choices is not None
    assert [control.options for control in choices.controls] == [
        ["layer 1 · mlp.up_proj"],
        ["gradient", "momentum", "update", "weight"],
        ["step 20", "step 40"],
    ]
    assert choices.start == (0, 2, 1), "the last update"
    for stage in (0, 1):
        for kind, name in enumerate(("gradient", "momentum", "update", "weight")):
            for index in (0, 1):
                curve = choices.frames[0, kind, stage].curves[index]
                assert curve is not None
                assert curve[1][0] == pytest.approx(runs[index].records[stage]["spectra"][EXACT[0]][name][0], rel=1e-3)
    packed = json.loads(json.dumps(choices.packed()))
    assert len(packed["places"]) == 1, "all spectra here have the same ranks"
    assert len(packed["axes"]) <= 2 * 4, "axes hold scale and ticks; plotly fits the range to every stage"
    assert all(axis["autorange"] for axis in packed["axes"])


def test_a_clip_draws_what_it_allows_an_update() -> None:
    run = course([20])
    run.records[0]["parameters"][EXACT[0]]["update_limit"] = 0.015
    choices = figures(run)["Singular values through training"].choices
    assert choices is not None
    assert choices.frames[0, 2, 0].curves[1] == ((1, 32), (0.015, 0.015))
    assert choices.frames[0, 0, 0].curves[1] is None, "a limit of updates is none of gradients"


def test_runs_of_other_lengths_are_held_against_each_other_by_their_stages() -> None:
    choices = figures(course([20, 40]), course([20 * 3, 20 * 7], 1))["Singular values through training"].choices
    assert choices is not None
    assert choices.controls[2].options == ["steps 20 to 60", "steps 40 to 140"]
    assert all(frame.curves[0] and frame.curves[1] for frame in choices.frames.values())


def test_a_record_that_only_warns_is_no_stage() -> None:
    warns = {"step": 33, "skipped": 0, "parameters": {}, "alarms": [{"message": "it rises"}], "ms": 0.0}
    first, second = course([20, 40]), course([20, 40], 1)
    choices = figures(replace(first, records=[*first.records, warns]), second)["Largest value in each layer"].choices
    assert choices is not None
    assert choices.controls[1].options == ["step 20", "step 40"]
    assert spectra_section([replace(first, records=[warns])]) is None


def test_the_summary_takes_the_largest_or_the_median_of_matrices_in_layers() -> None:
    run = course([10, 20])
    for record_ in run.records:
        record_["parameters"]["lm_head.weight"]["update_to_weight"] = 99.0
    drawn = figures(run)["Update over weight (largest)"].drawing["data"][0]
    inside = [name for name in NAMES if "layers" in name]
    largest = [max(each["parameters"][name]["update_to_weight"] for name in inside) for each in run.records]
    assert (list(drawn["x"]), list(drawn["y"])) == ([10, 20], largest)


def test_the_largest_by_layer_is_that_of_its_matrices() -> None:
    run = course([10, 20])
    choices = figures(run)["Largest value in each layer"].choices
    assert choices is not None
    quantity = choices.controls[0].options.index("Update over weight")
    curve = choices.frames[quantity, 1].curves[0]
    assert curve is not None
    expected = [
        max(
            values["update_to_weight"]
            for name, values in run.records[1]["parameters"].items()
            if layer_of(name)[0] == layer
        )
        for layer in (0, 1)
    ]
    assert curve[1] == [pytest.approx(value, rel=1e-3) for value in expected]


def test_numbers_that_are_not_finite_leave_a_gap() -> None:
    run = course([20, 40])
    run.records[1]["parameters"][EXACT[0]]["update_to_weight"] = None
    run.records[1]["spectra"][EXACT[0]]["gradient"][0] = None
    for record_ in run.records:
        record_["spectra"][EXACT[0]]["momentum"][-1] = 0.0
    made = figures(run)
    choices = made["One matrix over training"].choices
    assert choices is not None
    at = (choices.controls[0].options.index("layer 1 · mlp.up_proj"), 0)
    curve = choices.frames[at].curves[0]
    assert curve is not None
    assert curve[1][1] is None


def test_names_are_short_and_still_tell_matrices_apart() -> None:
    names = ["model.layers.3.mlp.up_proj.weight", "h.11.attn.c_attn.weight[2]", "lm_head.weight"]
    short = short_names(names, digits=2)
    assert list(short.values()) == ["layer 03 · mlp.up_proj", "layer 11 · attn.c_attn[2]", "lm_head"]
    twins = ["encoder.layers.0.a.weight", "decoder.layers.0.a.weight"]
    assert list(short_names(twins).values()) == twins


@pytest.mark.parametrize(
    ("known", "shown", "kind", "tick"),
    [
        ([0.0], None, "linear", None),
        ([3.0, 3.1], None, "linear", None),
        ([1e-9, 2.0], None, "log", 1),
        ([1e-9, 2.0], [1.0, 2.0], "log", None),
        ([1.0, 100.0], [0.0, 1.0, 50.0], "log", "D2"),
    ],
)
def test_an_axis_is_logarithmic_for_wide_values_and_has_ticks_for_those_that_are_shown(
    known: list[float], shown: list[float] | None, kind: str, tick: object
) -> None:
    axis = axis_of(known, log=True, shown=shown)
    assert (axis["type"], axis["dtick"]) == (kind, tick)
    assert axis_of(known, log=False)["type"] == "linear"
    assert axis.keys() == axis_of([0.5], log=False, percent=True).keys()


def test_every_figure_with_lines_has_a_legend_that_needs_no_colour() -> None:
    made = figures(course([20, 40]), course([20, 40], 1))
    for figure in made.values():
        assert [(entry.recipe, entry.group) for entry in figure.legend] == [("recipe 0", "0"), ("recipe 1", "1")]
        assert len({entry.dashes for entry in figure.legend}) == 2
