"""A monitor on models and optimizers of every kind: what it finds there, and what it leaves out."""

import math

import pytest
import torch
from torch import nn

import spectrim


def watched(model, optimizer, **options):
    return spectrim.SpectralMonitor(model, optimizer, **{"every": 1, "out": None, **options})


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6))


def norm(tensor) -> float:
    return float(tensor.double().norm())


def test_names_do_not_show_that_a_model_is_compiled():
    model = network()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    with watched(compiled, optimizer) as monitor:
        compiled(torch.randn(5, 12)).sum().backward()
        expected = norm(model[2].weight.grad)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
    assert monitor.last["parameters"].keys() == {"0.weight", "2.weight"}
    assert monitor.last["parameters"]["2.weight"]["gradient_norm"] == pytest.approx(expected, rel=1e-5)


def test_a_compiled_step_is_measured_like_any_other():
    found = []
    for wrap in (lambda step: step, lambda step: torch.compile(step, backend="eager")):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1))
        x = torch.randn(5, 12)
        with watched(model, optimizer) as monitor:
            step = wrap(optimizer.step)
            for _ in range(3):
                model(x).sum().backward()
                step()
        assert monitor.last["step"] == 3
        found.append(monitor.last["parameters"]["0.weight"])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_a_closure_s_gradient_is_the_one_that_its_step_used():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(5, 12)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    with watched(model, optimizer) as monitor:
        optimizer.step(closure)
    assert monitor.last["parameters"]["2.weight"]["gradient_norm"] == pytest.approx(
        norm(model[2].weight.grad), rel=1e-5
    )


def test_frozen_parameters_and_those_without_a_gradient_are_left_out_until_they_have_one():
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model, optimizer) as monitor:
        model(torch.randn(5, 12)).sum().backward()
        optimizer.step()
        assert monitor.last["parameters"].keys() == {"2.weight"}
        model[0].weight.requires_grad_(True)
        optimizer.zero_grad()
        model[0](torch.randn(5, 12)).sum().backward()
        optimizer.step()
        assert monitor.last["parameters"].keys() == {"0.weight"}
        assert monitor.last["parameters"]["0.weight"]["gradient_norm"] == pytest.approx(norm(model[0].weight.grad))


def test_a_tied_weight_is_one_matrix_under_its_first_name():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model, optimizer) as monitor:
        model(torch.arange(9)).square().sum().backward()
        optimizer.step()
    assert monitor.last["parameters"].keys() == {"0.weight"}


def test_the_update_of_bfloat16_weights_is_what_really_moved():
    model = network().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = model[2].weight.detach().double()
    with watched(model, optimizer) as monitor:
        model(torch.randn(5, 12).bfloat16()).sum().backward()
        optimizer.step()
    moved = model[2].weight.detach().double() - before
    assert norm(moved) != pytest.approx(1e-3 * norm(model[2].weight.grad), rel=1e-2)
    assert monitor.last["parameters"]["2.weight"]["update_norm"] == pytest.approx(norm(moved), rel=1e-5)


def test_each_of_two_optimizers_has_a_monitor_of_its_own():
    model = network()
    optimizers = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]
    monitors = [watched(model, optimizer) for optimizer in optimizers]
    model(torch.randn(5, 12)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert [list(monitor.last["parameters"]) for monitor in monitors] == [["0.weight"], ["2.weight"]]


def test_parameters_that_are_swapped_are_followed():
    model = network()
    optimizer = spectrim.AdamW(model.parameters())
    with watched(model, optimizer) as monitor:
        model[2].weight = nn.Parameter(torch.randn(6, 20))
        optimizer.param_groups[0]["params"][2] = model[2].weight
        for _ in range(2):
            model(torch.randn(5, 12)).sum().backward()
            expected = norm(model[2].weight.grad)
            optimizer.step()
    assert monitor.last["parameters"]["2.weight"]["gradient_norm"] == pytest.approx(expected, rel=1e-5)


def test_memory_that_is_swapped_under_a_parameter_is_followed():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = {}
    with watched(model, optimizer, alarm=lambda step, values: seen.update({step: values["2.weight"]["update_rms"]})):
        for step in (1, 2):
            model[2].weight.data = model[2].weight.data.clone()
            model(torch.randn(5, 12)).sum().backward()
            before = model[2].weight.detach().clone()
            optimizer.step()
            moved = model[2].weight.detach() - before
            assert seen[step] == pytest.approx(float(moved.square().mean().sqrt()), rel=1e-4)


def test_kernels_in_any_memory_format_are_flattened():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 6, 3)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = {}
    with watched(model, optimizer, alarm=lambda step, values: seen.update(values)) as monitor:
        model(torch.randn(2, 4, 9, 9)).square().sum().backward()
        kept = model[0].weight.grad.clone()
        optimizer.step()
    entry = monitor.last["parameters"]["0.weight"]
    assert entry["gradient_spectral_norm"] == pytest.approx(
        float(torch.linalg.matrix_norm(kept.flatten(1), ord=2)), rel=1e-4
    )
    assert seen["0.weight"]["update_rms"] == pytest.approx(entry["update_rms"], rel=1e-4)


def test_a_sparse_gradient_is_measured_like_a_dense_one():
    model = nn.Embedding(30, 8, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model, optimizer) as monitor:
        model(torch.tensor([1, 1, 5])).square().sum().backward()
        grad = model.weight.grad.to_dense()
        optimizer.step()
    entry = monitor.last["parameters"]["weight"]
    assert entry["gradient_norm"] == pytest.approx(norm(grad), rel=1e-5)
    assert entry["gradient_spectral_norm"] == pytest.approx(float(torch.linalg.matrix_norm(grad, ord=2)), rel=1e-4)


@pytest.mark.parametrize("unscaled", [True, False])
def test_gradients_are_measured_without_the_scale_of_the_loss(unscaled):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 if unscaled else 0.1 / 1024)
    with watched(model, optimizer, loss_scale=lambda: 1024.0) as monitor:
        (1024 * model(torch.randn(5, 12)).sum()).backward()
        expected = model[2].weight.grad / 1024
        if unscaled:
            for parameter in model.parameters():
                parameter.grad /= 1024
            nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
        optimizer.step()
    entry = monitor.last["parameters"]["2.weight"]
    assert entry["gradient_norm"] == pytest.approx(norm(expected), rel=1e-5)
    assert entry["gradient_spectral_norm"] == pytest.approx(float(torch.linalg.matrix_norm(expected, ord=2)), rel=1e-4)


def test_parameters_of_no_model_are_named_by_their_place():
    parameter = nn.Parameter(torch.randn(4, 5))
    optimizer = torch.optim.SGD([parameter], lr=torch.tensor(0.1))
    with watched(nn.Module(), optimizer) as monitor:
        parameter.square().sum().backward()
        optimizer.step()
    assert monitor.last["parameters"].keys() == {"group 0, parameter 0"}


def test_a_wrapper_whose_hooks_never_run_is_looked_through():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self):
            self.optimizer.step()

    model = network()
    wrapper = Wrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    with watched(model, wrapper) as monitor:
        model(torch.randn(5, 12)).sum().backward()
        wrapper.step()
    assert monitor.last["step"] == 1


def test_a_step_that_fails_is_not_counted():
    model = network()
    optimizer = spectrim.AdamW(model.parameters(), on_nonfinite="raise")
    with watched(model, optimizer) as monitor:
        model(torch.randn(5, 12)).sum().backward()
        model[2].weight.grad[0, 0] = math.inf
        with pytest.raises(FloatingPointError):
            optimizer.step()
        assert monitor.steps_taken == 0
        model[2].weight.grad[0, 0] = 0.0
        optimizer.step()
    assert monitor.last["step"] == 1


def test_gradients_of_torch_s_optimizers_that_are_not_finite_are_counted():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model, optimizer) as monitor:
        for bad in (False, True):
            optimizer.zero_grad()
            model(torch.randn(5, 12)).sum().backward()
            if bad:
                model[2].weight.grad[0, 0] = math.nan
            optimizer.step()
    assert monitor.last["skipped"] == monitor.last["parameters"]["2.weight"]["skipped"] == 1


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match="SGDNot"):
        watched(network(), type("SGDNot", (), {})())
