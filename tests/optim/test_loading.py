"""State dicts into an optimizer: what fits goes on as it was, what does not is refused by name and changes nothing."""

import copy
import io

import pytest
import torch
from torch import nn

import spectrim
from spectrim.optim.rules.schedule import clip_threshold

MAKERS = {
    "AdamW": lambda params, **o: spectrim.AdamW(params, lr=1e-2, **o),
    "AdamW clipped": lambda params, **o: spectrim.AdamW(params, lr=1e-2, clip="auto", **o),
    "AdEMAMix": lambda params, **o: spectrim.AdEMAMix(params, lr=1e-2, **o),
    "MARS": lambda params, **o: spectrim.MARS(params, lr=1e-2, **o),
    "Spectra": lambda params, **o: spectrim.Spectra(params, lr=1e-2, **o),
    "Muon": lambda params, **o: spectrim.Muon(params, lr=1e-2, **o),
    "Signum": lambda params, **o: spectrim.Signum(params, lr=1e-2, **o),
}


def model(rows: int = 6, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"table": nn.Embedding(rows, 4), "hidden": nn.Linear(4, 8)}).to(dtype)


def step(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.step()


def state_of(optimizer: torch.optim.Optimizer) -> list[dict[str, torch.Tensor]]:
    return [
        {key: value.clone() for key, value in optimizer.state[parameter].items()}
        for group in optimizer.param_groups
        for parameter in group["params"]
        if optimizer.state.get(parameter)
    ]


# -- What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [3, 60])
@pytest.mark.parametrize("maker", MAKERS)
def test_state_of_another_shape_is_refused_by_name_and_changes_nothing(maker, rows):
    module, other = model(), model(rows)
    optimizer, saved = MAKERS[maker](module.named_parameters()), MAKERS[maker](other.named_parameters())
    step(module, optimizer)
    step(other, saved)
    before, groups = state_of(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=rf"of table.weight has shape \({rows}, 4\): expected \(6, 4\)"):
        optimizer.load_state_dict(saved.state_dict())
    for old, new in zip(before, state_of(optimizer), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)
    assert optimizer.state_dict()["param_groups"] == groups


@pytest.mark.parametrize("maker", MAKERS)
def test_a_weight_that_was_grown_in_place_is_refused_at_the_step_before_anything_moves(maker):
    module = model()
    optimizer = MAKERS[maker](module.named_parameters())
    step(module, optimizer)
    module["table"].weight.data = torch.zeros(60, 4)
    before = module["hidden"].weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"table.weight has shape \(60, 4\) and its state .* \(6, 4\)"):
        step(module, optimizer)
    assert torch.equal(module["hidden"].weight, before)


@pytest.mark.parametrize(("mine", "theirs"), [("Spectra", "AdamW"), ("AdamW", "Muon"), ("Muon", "Spectra")])
def test_another_recipes_state_is_refused_by_name(mine, theirs):
    module, other = model(), model()
    optimizer, saved = MAKERS[mine](module.named_parameters()), MAKERS[theirs](other.named_parameters())
    step(other, saved)
    with pytest.raises(ValueError, match=r"of the recipe|belongs to another optimizer"):
        optimizer.load_state_dict(saved.state_dict())
    assert not optimizer.state


def test_groups_that_match_neither_by_name_nor_by_place_are_refused_with_advice():
    saved = torch.optim.AdamW(model().parameters())
    optimizer = spectrim.AdamW(spectrim.param_groups(model()))
    with pytest.raises(ValueError, match=r"groups of \[3\] parameters .*named_parameters\(\)"):
        optimizer.load_state_dict(saved.state_dict())


# -- What is completed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", MAKERS)
def test_options_that_a_checkpoint_lacks_are_those_of_the_constructor(maker):
    module, other = model(), model()
    saved = MAKERS[maker](other.named_parameters())
    step(other, saved)
    old = copy.deepcopy(saved.state_dict())
    kept = {"params", "param_names", "lr", "weight_decay", "betas", "steps_taken", "recipe"}
    for group in old["param_groups"]:
        for key in set(group) - kept:
            del group[key]
    optimizer = MAKERS[maker](module.named_parameters())
    optimizer.load_state_dict(old)
    assert set(optimizer.param_groups[0]) == set(saved.param_groups[0])
    module.load_state_dict(other.state_dict())
    step(module, optimizer, 1)
    step(other, saved, 1)
    for mine, its in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("named", [False, True])
def test_a_run_of_torch_adamw_goes_on_as_it_would_have(named):
    module, other = model(), model()
    theirs = torch.optim.AdamW(other.named_parameters() if named else other.parameters(), lr=3e-3, weight_decay=0.2)
    for seed in range(3):
        step(other, theirs, seed)
    module.load_state_dict(other.state_dict())
    mine = spectrim.AdamW(module.named_parameters() if named else module.parameters(), lr=1.0)
    mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert mine.param_groups[0]["lr"] == 3e-3
    assert mine.param_groups[0]["steps_taken"] == 3
    for seed in range(3, 6):
        step(other, theirs, seed)
        step(module, mine, seed)
    for ours, its in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("theirs", ["torch", "spectrim, warmup_steps=0"])
def test_a_run_that_goes_on_in_its_decay_has_no_warm_up(theirs):
    module, other = model(), model()
    if theirs == "torch":
        saved = torch.optim.AdamW(other.parameters(), lr=1e-2)
    else:
        saved = spectrim.AdamW(other.parameters(), lr=1e-2, clip=1.0, warmup_steps=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(saved, 4)
    for seed in range(3):
        step(other, saved, seed)
        schedule.step()
    old = saved.state_dict()
    old["param_groups"][0].pop("largest_lr", None)
    optimizer = spectrim.AdamW(module.parameters(), lr=1e-2, clip=1.0)
    optimizer.load_state_dict(old)
    (group,) = optimizer.param_groups
    assert 0 < group["lr"] < group["initial_lr"]
    assert group["warmup_steps"] == ("auto" if theirs == "torch" else 0)
    assert clip_threshold(group) == 1.0


def test_one_group_of_torch_becomes_several_by_name_which_keep_what_they_are():
    module, other = model(), model()
    theirs = torch.optim.AdamW(other.named_parameters(), lr=1e-2, weight_decay=0.2)
    step(other, theirs)
    groups = spectrim.param_groups(module, embedding_lr=4.0, split={"hidden.*": (4, 4)})
    mine = spectrim.AdamW(groups, lr=1e-2, clip="auto")
    mine.load_state_dict(theirs.state_dict())
    rows = {row.name: row for row in spectrim.describe(mine).rows}
    assert rows["table.weight"].lr == pytest.approx(4e-2)
    assert rows["hidden.weight"].matrix == "2 x (4, 4)"
    assert rows["hidden.weight"].weight_decay == 0.2
    # torch decays vectors; these groups said that theirs do not.
    assert rows["hidden.bias"].weight_decay == 0.0
    for name, parameter in module.named_parameters():
        moment = theirs.state[other.get_parameter(name)]["exp_avg"]
        assert torch.equal(mine.state[parameter]["exp_avg"], moment)


def test_the_slow_average_that_torch_does_not_have_begins_at_zero():
    module, other = model(), model()
    theirs = torch.optim.AdamW(other.parameters(), lr=1e-2)
    step(other, theirs)
    mine = spectrim.AdEMAMix(module.parameters())
    saved = theirs.state_dict()
    saved["param_groups"][0]["betas"] = (0.9, 0.999, 0.9999)
    mine.load_state_dict(saved)
    for parameter, its in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.state[parameter]["exp_avg"], theirs.state[its]["exp_avg"])
        assert not mine.state[parameter]["exp_avg_slow"].any()


def test_counts_of_skipped_steps_travel():
    module, other = model(), model()
    saved = spectrim.AdamW(other.named_parameters())
    other["table"].weight.grad = torch.full((6, 4), torch.nan)
    saved.step()
    optimizer = spectrim.AdamW(module.named_parameters())
    optimizer.load_state_dict(saved.state_dict())
    assert optimizer.skipped_steps() == {"table.weight": 1}


# -- Where and in what it goes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", MAKERS)
def test_all_state_goes_to_the_device_of_its_parameter(maker):
    module, other = model(), model()
    saved = MAKERS[maker](other.named_parameters())
    step(other, saved)
    # "meta" stands for an accelerator, and the saved state for one that was read with map_location="cpu".
    optimizer = MAKERS[maker](module.to("meta").named_parameters())
    optimizer.load_state_dict(saved.state_dict())
    for state in state_of(optimizer):
        assert {value.device.type for value in state.values()} == {"meta"}


@pytest.mark.parametrize(("saved_as", "wanted"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
@pytest.mark.parametrize("maker", MAKERS)
def test_state_takes_the_dtype_in_which_it_would_have_been_made(maker, saved_as, wanted):
    other, module = model(dtype=saved_as), model(dtype=wanted)
    saved, optimizer = MAKERS[maker](other.named_parameters()), MAKERS[maker](module.named_parameters())
    step(other, saved)
    optimizer.load_state_dict(saved.state_dict())
    fresh = MAKERS[maker](module.named_parameters())
    step(module, fresh)
    for loaded, made in zip(state_of(optimizer), state_of(fresh), strict=True):
        assert {key: value.dtype for key, value in loaded.items()} == {key: value.dtype for key, value in made.items()}
    step(module, optimizer)


@pytest.mark.parametrize("maker", MAKERS)
def test_what_is_saved_reads_with_weights_only(maker):
    module = model()
    optimizer = MAKERS[maker](module.named_parameters(), betas=[0.9, 0.95, 0.99][: 3 if maker == "AdEMAMix" else 2])
    step(module, optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["param_groups"] == optimizer.state_dict()["param_groups"]


def test_hooks_of_loading_run_as_torch_documents_them():
    module, other = model(), model()
    saved = spectrim.AdamW(other.named_parameters(), lr=0.5)
    optimizer = spectrim.AdamW(module.named_parameters(), lr=0.1)
    seen = []

    def halved(_, state_dict):
        state_dict["param_groups"] = copy.deepcopy(state_dict["param_groups"])
        state_dict["param_groups"][0]["lr"] /= 2
        return state_dict

    optimizer.register_load_state_dict_pre_hook(halved)
    optimizer.register_load_state_dict_post_hook(lambda loaded: seen.append(loaded.param_groups[0]["lr"]))
    given = saved.state_dict()
    optimizer.load_state_dict(given)
    assert seen == [0.25]
    assert given["param_groups"][0]["lr"] == 0.5


def test_groups_that_have_names_keep_them_and_others_take_the_saved_one():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    one = spectrim.AdamW(spectrim.param_groups(model))
    two = spectrim.AdamW(spectrim.param_groups(model, overrides={"0.weight": {"clip": 1.0}}))
    nameless = spectrim.AdamW(model.named_parameters())
    assert len(one.param_groups) == 1
    for optimizer in (two, nameless):
        optimizer.load_state_dict(one.state_dict())
    assert [group["name"] for group in two.param_groups] == ["matrix", "matrix-2"]
    assert [group["name"] for group in nameless.param_groups] == ["matrix"]
