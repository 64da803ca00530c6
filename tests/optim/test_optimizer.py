"""The optimizer class: layouts, buckets, state, faults, options, and what torch.optim promises."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import spectrim
from spectrim.optim.grouping.options import SpectralOptions
from spectrim.optim.rules.schedule import clip_threshold
from spectrim.optim.screening import nonfinite as screening_module
from spectrim.optim.stepping import buckets

RECIPES = {
    "adamw": lambda params, **options: spectrim.AdamW(params, **options),
    "adamw+clip": lambda params, **options: spectrim.AdamW(params, clip=0.7, **options),
    "adamw+shrink": lambda params, **options: spectrim.AdamW(params, shrink=2.0, **options),
    "spectra": lambda params, **options: spectrim.Spectra(params, **options),
    "spectra+clip": lambda params, **options: spectrim.Spectra(params, clip=0.5, **options),
    "muon": lambda params, **options: spectrim.Muon(params, **options),
    "signum+clip": lambda params, **options: spectrim.Signum(params, clip=0.7, **options),
    "ademamix+clip": lambda params, **options: spectrim.AdEMAMix(params, clip=0.7, slow_warmup_steps=5, **options),
    "mars+clip": lambda params, **options: spectrim.MARS(params, clip=0.7, gamma=0.5, **options),
    "momentum": lambda params, **options: spectrim.Momentum(params, **options),
    "mars, bfloat16 state": lambda params, **options: spectrim.MARS(params, state_dtype="bfloat16", **options),
    "spectra, bfloat16 state": lambda params, **options: spectrim.Spectra(params, state_dtype="bfloat16", **options),
}
every_recipe = pytest.mark.parametrize("make", RECIPES.values(), ids=RECIPES.keys())


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Embedding(11, 12), nn.Linear(12, 20), nn.LayerNorm(20), nn.Linear(20, 12), nn.Linear(12, 20)
    )


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        tokens = torch.randint(11, (32,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(tokens).square().mean().backward()
        optimizer.step()


def tensors(model, optimizer, but=()):
    state = [v for p in model.parameters() for k, v in sorted(optimizer.state.get(p, {}).items()) if k not in but]
    return [tensor.clone() for tensor in [*(p.detach() for p in model.parameters()), *state]]


def assert_same(actual, expected):
    for mine, its in zip(actual, expected, strict=True):
        assert torch.equal(mine, its)


# -- How parameters are read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [m for name, m in RECIPES.items() if "bfloat16" not in name])  # its noise has a layout
@pytest.mark.parametrize(
    ("layout", "shape", "split", "view"),
    [
        ("transposed", (30, 20), None, lambda t: [t.mT]),
        ("flatten", (12, 5, 2, 2), None, lambda t: [t.flatten(1)]),
        ("matrix", (30, 20), (12, 18), lambda t: list(t.split((12, 18)))),
        ("transposed", (20, 30), (12, 18), lambda t: list(t.mT.split((12, 18)))),
        ("transposed_stack", (2, 20, 30), None, lambda t: [t.mT]),
    ],
)
def test_a_layout_is_read_as_its_logical_matrices(make, layout, shape, split, view):
    whole = nn.Parameter(torch.randn(shape))
    parts = [nn.Parameter(part.clone().contiguous()) for part in view(whole.detach())]
    group = {"params": [whole], "role": "matrix", "layout": layout, "split": split}
    optimizers = [make([group], lr=1e-2), make(parts, lr=1e-2)]
    for step in range(5):
        whole.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        for part, grad in zip(parts, view(whole.grad), strict=True):
            part.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for part, expected in zip(view(whole.detach()), parts, strict=True):
        torch.testing.assert_close(part, expected.detach(), rtol=1e-4, atol=1e-5)


@every_recipe
def test_a_bucket_of_many_is_each_by_itself(make, monkeypatch):
    results = []
    for limit in (0, 2 * 4 * 20 * 12, 2**20):
        monkeypatch.setitem(buckets.BUCKET_BYTES, "cpu", limit)
        model = nn.ModuleList(nn.Linear(12, 20, bias=False) for _ in range(5))
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        optimizer = make(model.parameters(), lr=1e-2)
        for _ in range(5):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    for other in results[1:]:
        for mine, its in zip(results[0], other, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


def test_roles_outside_the_scope_get_plain_adamw():
    model = small_model()
    optimizer = spectrim.AdamW(spectrim.param_groups(model), clip=0.7, clip_scope="matrices")
    rules = {row.name: row.rule for row in spectrim.describe(optimizer).rows}
    assert rules["1.weight"] == "adam → clip"
    assert {rules[name] for name in ("0.weight", "1.bias", "2.weight")} == {"adamw"}


def test_role_factors_scale_the_learning_rate_and_the_automatic_threshold_follows():
    groups = spectrim.param_groups(small_model(), embedding_lr=4.0)
    optimizer = spectrim.AdamW(groups, lr=1e-3, clip="auto")
    found = {group["role"]: (group["lr"], clip_threshold(group)) for group in optimizer.param_groups}
    assert found["embedding"] == (4e-3, pytest.approx(10.0))
    assert found["matrix"] == (1e-3, pytest.approx(10.0))
    again = spectrim.AdamW(optimizer.param_groups, lr=5.0)
    assert [group["lr"] for group in again.param_groups] == [group["lr"] for group in optimizer.param_groups]


# -- State -------------------------------------------------------------------------------------------------------------


@every_recipe
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_continues_bit_for_bit(make, dtype, tmp_path):
    whole, first = small_model().to(dtype), small_model().to(dtype)
    optimizer = make(spectrim.param_groups(whole), lr=1e-2)
    train(whole, optimizer, 8)
    half = make(spectrim.param_groups(first), lr=1e-2)
    train(first, half, 4)
    torch.save({"model": first.state_dict(), "optimizer": half.state_dict()}, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    second = small_model(seed=9).to(dtype)
    second.load_state_dict(saved["model"])
    resumed = make(spectrim.param_groups(second), lr=1e-2)
    resumed.load_state_dict(saved["optimizer"])
    train(second, resumed, 4, first=4)
    assert_same(tensors(second, resumed), tensors(whole, optimizer))


@every_recipe
def test_state_is_made_at_the_first_step_for_all_that_train_and_priming_leaves_it_fresh(make, screening):
    model = small_model()
    model[2].bias.requires_grad_(False)
    optimizer = make(list(model.named_parameters()), lr=1e-2)
    assert not optimizer.state
    assert not optimizer.state_dict()["state"]
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    model[1].weight.grad = torch.zeros_like(model[1].weight)
    optimizer.step()
    assert set(optimizer.state) == {p for p in model.parameters() if p.requires_grad}
    assert all(len(state) >= 3 for state in optimizer.state.values())
    assert_same([parameter.detach() for parameter in model.parameters()], weights)
    assert all(group["steps_taken"] == 0 for group in optimizer.param_groups)
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    fresh_model = small_model()
    fresh_model[2].bias.requires_grad_(False)
    fresh = make(list(fresh_model.named_parameters()), lr=1e-2)
    train(model, optimizer, 3)
    train(fresh_model, fresh, 3)
    assert_same(tensors(model, optimizer), tensors(fresh_model, fresh))


@every_recipe
def test_parameters_swapped_after_construction_get_state_and_the_old_ones_lose_it(make):
    model, twin = small_model(), small_model()
    optimizer, expected = make(spectrim.param_groups(model), lr=1e-2), make(spectrim.param_groups(twin), lr=1e-2)
    swapped = {p: nn.Parameter(p.detach().clone()) for p in model.parameters()}
    for group in optimizer.param_groups:
        group["params"] = [swapped[p] for p in group["params"]]
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, swapped[parameter])
    train(model, optimizer, 3)
    train(twin, expected, 3)
    assert set(optimizer.state) == set(swapped.values())
    assert_same(tensors(model, optimizer), tensors(twin, expected))


@every_recipe
def test_copies_and_pickles_go_on_alike(make):
    model = small_model()
    optimizer = make(spectrim.param_groups(model), lr=1e-2)
    train(model, optimizer, 3)
    model_copy, optimizer_copy = copy.deepcopy((model, optimizer))
    model_pickle, optimizer_pickle = pickle.loads(pickle.dumps((model, optimizer)))
    for pair in ((model, optimizer), (model_copy, optimizer_copy), (model_pickle, optimizer_pickle)):
        train(*pair, 3, first=3)
    assert_same(tensors(model_copy, optimizer_copy), tensors(model, optimizer))
    assert_same(tensors(model_pickle, optimizer_pickle), tensors(model, optimizer))


# -- Faults ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["host", "device"])
def screening(request, monkeypatch):
    """Runs a test where flags are read, and where they stay on the device as on an accelerator."""
    if request.param == "device":
        monkeypatch.setattr(screening_module, "reading_is_free", lambda device: False)
    return request.param


@every_recipe
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_non_finite_gradient_skips_the_whole_step_and_is_counted(make, bad, screening):
    model = small_model()
    optimizer = make(spectrim.param_groups(model), lr=1e-2)
    train(model, optimizer, 3)
    before = tensors(model, optimizer, but="skipped")
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
    model[1].weight.grad[3, 2] = bad
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    optimizer.step()
    assert_same(tensors(model, optimizer, but="skipped"), before)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=0, equal_nan=True)
    assert optimizer.skipped_steps() == {"1.weight": 1}
    assert copy.deepcopy(optimizer).skipped_steps() == {"1.weight": 1}
    again = make(spectrim.param_groups(model), lr=1e-2)
    again.load_state_dict(optimizer.state_dict())
    assert again.skipped_steps() == {"1.weight": 1}


@every_recipe
def test_a_skipped_first_step_leaves_the_second_as_the_first_would_have_been(make, screening):
    results = []
    for disturbed in (False, True):
        model = small_model()
        optimizer = make(spectrim.param_groups(model), lr=1e-2)
        if disturbed:
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, float("nan"))
            optimizer.step()
        if screening == "device":  # where the host cannot know that nothing was done yet
            for group in optimizer.param_groups:
                group["steps_taken"] = 1
        train(model, optimizer, 3)
        results.append(tensors(model, optimizer, but="skipped"))
    assert_same(*results)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_non_finite_gradient_on_one_device_skips_the_step_on_all(bad, monkeypatch):
    monkeypatch.setattr(screening_module, "reading_is_free", lambda device: False)
    # Each parameter as if on a device of its own.
    monkeypatch.setattr(screening_module, "_by_device", lambda entries: [(e.grad.device, [e]) for e in entries])
    parameters = [nn.Parameter(torch.randn(4, 3)) for _ in range(3)]
    optimizer = spectrim.AdamW(parameters, lr=0.1)
    for number in range(3):
        before = [parameter.detach().clone() for parameter in parameters]
        for parameter in parameters:
            parameter.grad = torch.randn(4, 3)
        if number == 1:
            parameters[bad].grad[0, 0] = float("nan")
        optimizer.step()
        for parameter, old in zip(parameters, before, strict=True):
            assert torch.equal(parameter, old) == (number == 1)
            assert optimizer.state[parameter]["step"] == number + (number == 0)
    assert optimizer.skipped_steps() == {f"group 0, parameter {bad}": 1}


def test_twenty_skipped_steps_in_a_row_are_warned_of_by_name(screening):
    parameters = [("good", nn.Parameter(torch.ones(3, 2))), ("bad", nn.Parameter(torch.ones(2)))]
    optimizer = spectrim.AdamW(parameters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(45):
            for name, parameter in parameters:
                parameter.grad = torch.full_like(parameter, 1.0 if name == "good" else float("nan"))
            optimizer.step()
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 1
    assert "20 steps in a row" in messages[0]
    assert "bad" in messages[0]
    assert "good" not in messages[0]


def test_raising_names_the_parameter_and_moves_nothing():
    model = small_model()
    optimizer = spectrim.AdamW(spectrim.param_groups(model), clip=1.0, on_nonfinite="raise")
    train(model, optimizer, 2)
    before = tensors(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model[4].weight.grad[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"4\.weight"):
        optimizer.step()
    assert_same(tensors(model, optimizer), before)


@every_recipe
def test_flags_on_the_device_give_what_reading_them_gives(make, monkeypatch):
    results = []
    for free in (True, False):
        monkeypatch.setattr(screening_module, "reading_is_free", lambda device, free=free: free)
        model = small_model()
        optimizer = make(spectrim.param_groups(model), lr=1e-2)
        train(model, optimizer, 5)
        results.append(tensors(model, optimizer))
    for mine, its in zip(*results, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


@every_recipe
def test_missing_and_empty_gradients_are_served(make):
    model = nn.ParameterList(
        [nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(0, 6)), nn.Parameter(torch.randn(3))]
    )
    optimizer = make([p for p in model if p.numel()], lr=1e-2)
    model[0].grad = torch.randn(4, 6)
    third = model[2].detach().clone()
    optimizer.step()
    assert torch.equal(model[2], third)
    assert optimizer.state[model[2]]["step"] == 0


# -- Options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": -1.0}, r"clip=-1.0 for group 0.*positive number"),
        ({"clip": "automatic"}, r"clip='automatic'.*\"auto\""),
        ({"shrink": 0.0}, r"shrink=0.0"),
        ({"clip_decay": "cosin", "total_steps": 10}, r"clip_decay='cosin' for group 0 \('0.weight'\): .*'cosine'"),
        ({"clip_decay": "cosine"}, r"total_steps=None"),
        ({"clip_scope": "some"}, r"clip_scope='some'.*'all', 'matrices'"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\)"),
        ({"lr": -1.0}, r"lr=-1.0"),
        ({"on_nonfinite": "ignore"}, r"on_nonfinite='ignore'"),
        ({"precision": "double"}, r"precision='double'.*'auto', 'exact', 'half'"),
        ({"betas": (0.9, 0.99, 0.999)}, r"betas=.*2 numbers"),
        ({"betas": 0.9}, r"betas=0.9"),
        ({"peak_lr": -1.0}, r"peak_lr=-1.0"),
        ({"peak_lr": float("nan")}, r"peak_lr=nan"),
        ({"lr": "1e-3"}, r"lr='1e-3'.*number"),
        ({"maximize": "false"}, r"maximize='false'.*True or False"),
        ({"warmup_steps": 2.5}, r"warmup_steps=2.5.*whole number"),
        ({"weight_decay": float("inf")}, r"weight_decay=inf"),
    ],
)
def test_a_bad_value_is_named_with_its_place_and_the_choices(options, message):
    with pytest.raises(ValueError, match=message):
        spectrim.AdamW(spectrim.param_groups(small_model()), **options)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (spectrim.AdEMAMix, {"alpha": float("nan")}, r"alpha=nan"),
        (spectrim.MARS, {"gamma": -1.0}, r"gamma=-1.0 .* expected a number of at least 0"),
        (spectrim.MARS, {"adamw_betas": (0.9, 0.99, 0.9)}, r"adamw_betas=.* expected 2 numbers"),
        (spectrim.Muon, {"nesterov": "false"}, r"nesterov='false'.*True or False"),
        (spectrim.Spectra, {"rank_ratio": 0.0}, r"rank_ratio=0.0"),
        (spectrim.Muon, {"orthogonalize_steps": 0}, r"orthogonalize_steps=0"),
    ],
)
def test_a_bad_value_of_a_recipes_own_option_is_an_error(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(spectrim.param_groups(small_model()), **options)


def test_an_unknown_option_is_an_error_that_lists_the_known_ones():
    with pytest.raises(TypeError, match=r"'clipp'.*warmup_steps"):
        spectrim.AdamW(small_model().parameters(), clipp=1.0)
    with pytest.warns(UserWarning, match=r"'clipp' for group 0.*did you mean 'clip'"):
        optimizer = spectrim.AdamW([{"params": list(small_model().parameters()), "clipp": 1.0}])
    assert optimizer.param_groups[0]["clipp"] == 1.0


def test_every_documented_option_has_a_default_in_the_groups():
    group = spectrim.Muon(small_model().parameters()).param_groups[0]
    assert set(SpectralOptions.__annotations__) <= set(group)


# -- torch.optim's promises --------------------------------------------------------------------------------------------


@every_recipe
def test_closures_hooks_and_schedulers_work(make):
    model = small_model()
    optimizer = make(spectrim.param_groups(model), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 3))
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    tokens = torch.arange(11)

    def closure():
        optimizer.zero_grad()
        loss = model(tokens).square().mean()
        loss.backward()
        return loss

    losses = []
    for _ in range(6):
        losses.append(optimizer.step(closure).item())
        scheduler.step()
    assert calls == ["before", "after"] * 6
    assert losses[0] == losses[1]  # the first learning rate is zero
    assert losses[-1] < losses[0]


@every_recipe
def test_maximize_ascends(make):
    model, twin = small_model(), small_model()
    up, down = (make(spectrim.param_groups(m), lr=1e-2, maximize=flag) for m, flag in ((model, True), (twin, False)))
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        its.grad = torch.randn(its.shape, generator=torch.Generator().manual_seed(1))
        mine.grad = -its.grad
    up.step()
    down.step()
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, its)


def test_a_group_can_be_added_later():
    model = small_model()
    optimizer = spectrim.Spectra(model[1].parameters(), lr=1e-2)
    optimizer.add_param_group({"params": list(model[3].parameters()), "lr": 5e-3})
    assert optimizer.param_groups[1]["lr"] == 5e-3
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert "spike_basis" in optimizer.state[model[3].weight]


def test_groups_keep_their_own_betas_eps_rate_and_decay():
    torch.manual_seed(0)
    mine = [nn.Parameter(torch.randn(4, 3)) for _ in range(3)]
    its = [nn.Parameter(parameter.detach().clone()) for parameter in mine]
    options = ({}, {"betas": (0.5, 0.9), "eps": 1e-3}, {"lr": 1e-3, "weight_decay": 0.5})

    def groups(parameters):
        return [{"params": [p], **given} for p, given in zip(parameters, options, strict=True)]

    optimizer, expected = spectrim.AdamW(groups(mine), lr=0.1), torch.optim.AdamW(groups(its), lr=0.1)
    for _ in range(3):
        for parameter, other in zip(mine, its, strict=True):
            parameter.grad = torch.randn_like(parameter)
            other.grad = parameter.grad.clone()
        optimizer.step()
        expected.step()
    for parameter, other in zip(mine, its, strict=True):
        torch.testing.assert_close(parameter, other)


@every_recipe
def test_tensor_learning_rates_are_followed(make):
    # Float64: a step may magnify rounding, and that of a tensor's product need not be that of a number's.
    models = [small_model().double() for _ in range(2)]
    rates = [torch.tensor(1e-2, dtype=torch.float64), 1e-2]
    tensor, number = (make(spectrim.param_groups(m), lr=lr) for m, lr in zip(models, rates, strict=True))
    for first, rate in enumerate([1e-2, 5e-3]):
        rates[0].fill_(rate)
        for group in number.param_groups:
            group["lr"] = rate
        for model, optimizer in zip(models, (tensor, number), strict=True):
            train(model, optimizer, 2, first=2 * first)
    for mine, its, before in zip(*(m.parameters() for m in (*models, small_model().double())), strict=True):
        assert not torch.equal(its, before)
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-9)
