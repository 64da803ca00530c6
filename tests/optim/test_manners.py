"""What users and frameworks give an optimizer besides parameters: taken as torch takes it, or refused plainly."""

import collections
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import spectrim

OURS = ("AdamW", "AdEMAMix", "MARS", "Spectra", "Muon", "Signum", "Momentum")


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape or (4, 4)))


@pytest.mark.parametrize("name", [*OURS, "SpectralClipping"])
def test_a_device_without_float64_is_refused_by_name(name):
    with FakeTensorMode():
        there = [("layers.0.weight", nn.Parameter(torch.empty(4, 4, device="mps")))]
        with pytest.raises(ValueError, match=r"layers.0.weight is on mps:0, which has no float64"):
            spectrim.SpectralClipping(torch.optim.SGD(there)) if name not in OURS else getattr(spectrim, name)(there)


# -- Groups ------------------------------------------------------------------------------------------------------------

KEYS = [{"name": "decoder"}, {"fused": False, "foreach": False}, {"rho": 0.05}, {"layer_id": 3}, {"is_expert": True}]


@pytest.mark.parametrize("extra", KEYS, ids=lambda extra: next(iter(extra)))
@pytest.mark.parametrize("name", OURS)
def test_keys_of_others_are_kept_in_groups_and_checkpoints_without_a_word(name, extra):
    parameter = weight()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = getattr(spectrim, name)([{"params": [parameter], **extra}])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    again = getattr(spectrim, name)([{"params": [parameter]}])
    again.load_state_dict(optimizer.state_dict())
    for group in (optimizer.param_groups[0], again.param_groups[0]):
        assert extra.items() <= group.items()


@pytest.mark.parametrize(("wrong", "right"), [("weightdecay", "weight_decay"), ("clip_scop", "clip_scope")])
def test_a_key_one_letter_from_an_option_is_kept_with_a_warning(wrong, right):
    with pytest.warns(UserWarning, match=rf"{wrong}.* has no effect: did you mean '{right}'"):
        spectrim.AdamW([{"params": [weight()], wrong: 0.1}])


def test_a_refused_group_leaves_nothing_behind():
    optimizer = spectrim.AdamW([("first", weight())])
    modes = nn.Parameter(torch.randn(4, 4, dtype=torch.cfloat))
    with pytest.raises(ValueError, match=r"modes has dtype torch.complex64"):
        optimizer.add_param_group({"params": [("modes", modes)]})
    with pytest.raises(ValueError, match=r"lr=-1.0 for group 1 \('second'\)"):
        optimizer.add_param_group({"params": [("second", weight())], "lr": -1.0})
    assert len(optimizer.param_groups) == 1


# -- Values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "plain"),
    [
        ("lr", np.float32(0.5), 0.5),
        ("weight_decay", np.float64(0.25), 0.25),
        ("betas", (np.float32(0.5), np.float32(0.75)), (0.5, 0.75)),
        ("betas", [0.9, 0.95], (0.9, 0.95)),
        ("betas", collections.UserList([0.9, 0.95]), (0.9, 0.95)),  # as hydra's ListConfig is one
        ("clip", np.float32(3.0), 3.0),
        ("warmup_steps", np.int64(5), 5),
    ],
)
def test_numbers_of_any_kind_become_plain_ones(option, value, plain):
    found = spectrim.AdamW([weight()], **{option: value}).param_groups[0][option]
    assert found == plain
    assert type(found) is type(plain)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", "1e-3"),
        ("lr", True),
        ("betas", 0.9),
        ("betas", (0.9,)),
        ("betas", (0.9, 0.99, 0.999)),
        ("peak_lr", "x"),
        ("peak_lr", -1.0),
        ("warmup_steps", 2.5),
        ("weight_decay", "0.1"),
        ("eps", float("nan")),
    ],
)
def test_other_values_are_refused_with_the_option_and_the_place(option, value):
    with pytest.raises(ValueError, match=rf"^{option}=.* for group 0"):
        spectrim.AdamW([weight()], **{option: value})


@pytest.mark.parametrize("option", ["lr", "weight_decay"])
def test_text_that_spells_a_number_is_called_text(option):
    with pytest.raises(ValueError, match=r"'2e-3'.* is text, not a number"):
        spectrim.AdamW([weight()], **{option: "2e-3"})


@pytest.mark.parametrize("name", OURS)
def test_a_learning_rate_tensor_stays_the_callers(name):
    lr, parameter = torch.tensor(0.0), weight()
    optimizer = getattr(spectrim, name)([parameter], lr=lr)
    lr.fill_(0.5)
    assert optimizer.param_groups[0]["lr"] is lr
    before = parameter.detach().clone()
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert not torch.equal(parameter, before)


# -- Parameters --------------------------------------------------------------------------------------------------------

CONVOLVING = {
    "AdamW": lambda groups: spectrim.AdamW(groups, lr=1e-2),
    "clip": lambda groups: spectrim.AdamW(groups, lr=1e-2, clip="auto"),
    "pre_clip": lambda groups: spectrim.AdamW(groups, lr=1e-2, pre_clip=0.1),
    "shrink": lambda groups: spectrim.AdamW(groups, lr=1e-2, shrink=1.0),
    "Spectra": lambda groups: spectrim.Spectra(groups, lr=1e-2),
    "Muon": lambda groups: spectrim.Muon(groups, lr=1e-2),
    "Signum": lambda groups: spectrim.Signum(groups, lr=1e-2, clip="auto"),
    "SpectralClipping": lambda groups: spectrim.SpectralClipping(torch.optim.AdamW(groups, lr=1e-2)),
    "clip_grad_spectral_": lambda groups: Around(groups, lambda: spectrim.clip_grad_spectral_(groups, 0.1)),
    "shrink_grad_": lambda groups: Around(groups, lambda: spectrim.shrink_grad_(groups, 1.0)),
}


class Around:
    def __init__(self, groups, before):
        self.before, self.base = before, torch.optim.SGD(groups, lr=1.0)

    def step(self):
        self.before()
        self.base.step()


@pytest.mark.parametrize("maker", CONVOLVING)
def test_a_convolution_in_channels_last_trains_as_a_contiguous_one(maker):
    def trained(layout):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 8, 3).to(memory_format=layout)
        optimizer = CONVOLVING[maker](spectrim.param_groups(model))
        for seed in range(3):
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(memory_format=layout)
            model.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        assert model.weight.is_contiguous(memory_format=layout)
        return model.weight.detach().contiguous()

    expected = trained(torch.contiguous_format)
    torch.testing.assert_close(trained(torch.channels_last), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OURS)
def test_a_model_may_be_cast_after_its_optimizer_was_made(name):
    def stepped(early):
        torch.manual_seed(0)
        model = nn.Linear(8, 8)
        cast = model if early else model.double()
        optimizer = getattr(spectrim, name)(model.parameters(), lr=1e-2)
        model = cast.double()
        model(torch.ones(2, 8, dtype=torch.float64)).sum().backward()
        optimizer.step()
        return model.weight.detach()

    assert torch.equal(stepped(True), stepped(False))


@pytest.mark.parametrize("name", OURS)
def test_frozen_parameters_cost_no_state_and_may_be_of_any_dtype(name):
    model = nn.Sequential(nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 4))
    model.quantised = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    optimizer = getattr(spectrim, name)(model.parameters(), lr=1e-2)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    assert set(optimizer.state) == set(model[1].parameters())


@pytest.mark.parametrize("name", OURS)
def test_narrow_state_serves_parameters_in_float64(name):
    parameter = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
    optimizer = getattr(spectrim, name)([parameter], lr=1e-2, state_dtype="bfloat16")
    for _ in range(2):
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    assert parameter.isfinite().all()


@pytest.mark.parametrize("name", OURS)
def test_a_checkpoint_may_be_asked_for_after_a_swap_of_parameters_and_before_a_step(name):
    model = nn.Linear(4, 4)
    optimizer = getattr(spectrim, name)(model.parameters(), lr=1e-2)
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(parameter.detach().clone()) for parameter in group["params"]]
    saved = optimizer.state_dict()
    assert saved["state"] == {}
    optimizer.load_state_dict(saved)
