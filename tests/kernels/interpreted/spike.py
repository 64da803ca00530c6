"""The step of Spectra by its own kernels against the step over stacks, which has the formulas."""

import copy
import dataclasses
import math

import pytest
import torch

import spectrim
from spectrim.kernels import use
from spectrim.kernels.device import spike
from spectrim.optim.stepping import step as steps

FLOAT32 = {"rtol": 2e-5, "atol": 2e-7}


def group(*shapes, dtype=torch.float32, **options):
    params = [torch.nn.Parameter((0.1 * torch.randn(shape)).to(dtype)) for shape in shapes]
    return {"params": params, "role": "matrix", **options}


def grads_of(optimizer, make=torch.randn):
    for params in optimizer.param_groups:
        for parameter in params["params"]:
            parameter.grad = make(parameter.shape).to(parameter.dtype)


def tensors(optimizer):
    """Weights and state by name."""
    found = {}
    for number, parameter in enumerate(p for params in optimizer.param_groups for p in params["params"]):
        found[f"{number}", "weight"] = parameter.detach()
        found |= {(f"{number}", key): value for key, value in optimizer.state[parameter].items()}
    return found


def both(optimizer, count=1, **tolerance):
    """Take steps in both forms from one start; the tensors by stacks, and a copy stepped by kernels, compared."""
    twin = copy.deepcopy(optimizer)
    for params, others in zip(optimizer.param_groups, twin.param_groups, strict=True):
        for parameter, other in zip(params["params"], others["params"], strict=True):
            other.grad = parameter.grad.clone()
    with use(False):
        for _ in range(count):
            optimizer.step()
    with use(True):
        for _ in range(count):
            twin.step()
    wanted, actual = tensors(optimizer), tensors(twin)
    for key, value in wanted.items():
        torch.testing.assert_close(actual[key], value, **{**FLOAT32, **tolerance}, msg=lambda m, key=key: f"{key}: {m}")
    return twin


@pytest.fixture
def stacked(monkeypatch) -> list[int]:
    """How many parameters each bucket had that was stepped over stacks."""
    sizes: list[int] = []
    step_bucket = steps.step_bucket

    def counted(bucket):
        sizes.append(sum(len(stack.entries) for stack in bucket))
        step_bucket(bucket)

    monkeypatch.setattr(steps, "step_bucket", counted)
    return sizes


def warm(*groups, **options):
    """Spectra after a step over stacks, with new gradients."""
    torch.manual_seed(0)
    optimizer = spectrim.Spectra(list(groups), lr=0.01, **{"rank_ratio": 0.1, **options})
    grads_of(optimizer)
    with use(False):
        optimizer.step()
    grads_of(optimizer)
    return optimizer


def test_matrices_of_many_shapes_and_ranks_share_one_table(stacked):
    shapes = [(48, 32), (70, 33), (5, 3), (1, 7), (7, 1), (130, 200), (32, 2)]
    optimizer = warm(group(*shapes), group((24, 16), weight_decay=0.5, lr=0.1))
    both(optimizer)
    # One bucket at the first step and one at the second; nothing by stacks where kernels ran.
    assert len(stacked) == 2


def test_tall_matrices_are_summed_in_parts(stacked, monkeypatch):
    monkeypatch.setattr(spike, "SPLIT", 32)
    both(warm(group((80, 24), (16, 24), (33, 8))))
    monkeypatch.setattr(spike.thin, "CHUNK", 32)
    both(warm(group((80, 24), (16, 24), (33, 8))))


def test_no_more_than_so_many_thin_matrices_are_worked_on_at_once(monkeypatch):
    optimizer = warm(group((20, 16), (12, 24), (16, 16)), weight_decay=0.3)
    monkeypatch.setattr(spike.thin, "WORKSPACE_BYTES", 1)
    both(optimizer)


def test_the_first_step_takes_more_power_steps(stacked):
    torch.manual_seed(1)
    optimizer = spectrim.Spectra([group((40, 24), (24, 33))], lr=0.01, rank_ratio=0.1)
    grads_of(optimizer)
    both(optimizer)
    assert len(stacked) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "stack"},
        {"layout": "stack", "split": (8, 4, 8)},
        {"layout": "flatten", "split": (16, 4)},
        {"split": (8, 8, 8)},
    ],
    ids=["experts", "split experts", "flattened", "split"],
)
def test_experts_splits_and_kernels_of_convolutions_are_runs_of_rows(stacked, options):
    shapes = {"stack": [(3, 20, 16), (2, 20, 5)], "flatten": [(20, 4, 3)]}.get(options.get("layout"), [(24, 16)])
    both(warm(group(*shapes, **options), rank_ratio=0.2))
    assert len(stacked) == 2


def test_weights_in_bfloat16_are_rounded_to_nearest(stacked):
    optimizer = warm(group((24, 40), (40, 16), dtype=torch.bfloat16))
    twin = both(optimizer, rtol=2**-7, atol=1e-6)
    weights = [torch.cat([p.detach().view(-1) for p in one.param_groups[0]["params"]]) for one in (optimizer, twin)]
    # A result on the edge between two numbers may fall on either side.
    assert (weights[0] != weights[1]).double().mean() < 0.01
    assert len(stacked) == 2


def test_a_rate_in_a_tensor_is_read_on_the_device(monkeypatch):
    optimizer = warm(group((24, 16), (16, 16)), weight_decay=0.5)
    rules = []
    original = steps.by_operators

    def as_on_a_device(entries):
        for entry in entries:
            entry.rule = dataclasses.replace(entry.rule, lr=torch.tensor(entry.rule.lr))
            rules.append(entry.rule)
        return original(entries)

    monkeypatch.setattr(steps, "by_operators", as_on_a_device)
    both(optimizer)
    assert rules


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e15])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 1.0])
def test_tails_small_and_large_have_their_scale(scale, noise):
    torch.manual_seed(2)
    optimizer = spectrim.Spectra([group((40, 48), (24, 20))], lr=0.01, rank_ratio=0.1)

    def low_rank(shape):
        return scale * (torch.randn(shape[0], 2) @ torch.randn(2, shape[1]) + noise * torch.randn(shape))

    grads_of(optimizer, low_rank)
    with use(False):
        optimizer.step()
    grads_of(optimizer, low_rank)
    # The basis has columns in no direction of a matrix of low rank: these are rounding's.
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if noise == 0 else {}
    both(optimizer, **{"atol": max(2e-6 * scale, 1e-6), **tolerance})


def test_matrices_without_gradients_come_to_rest():
    optimizer = warm(group((3, 16, 20), layout="stack"), weight_decay=0.0)
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad[1] = 0
    # The momentum of one expert is a tenth of what it was.
    optimizer.state[parameter]["norm_record"][1] *= 10
    before = parameter.detach().clone()
    twin = both(optimizer)
    moved = (tensors(twin)["0", "weight"] - before).square().mean((1, 2)).sqrt() / (0.01 * 0.2)
    assert moved[1] < 0.5
    torch.testing.assert_close(moved[::2], torch.ones(2), rtol=1e-3, atol=0)


def test_momentum_of_zeros_moves_nothing():
    torch.manual_seed(3)
    optimizer = spectrim.Spectra([group((24, 16))], lr=0.01, weight_decay=0.0, rank_ratio=0.1)
    grads_of(optimizer, torch.zeros)
    before = optimizer.param_groups[0]["params"][0].detach().clone()
    twin = both(optimizer)
    assert torch.equal(tensors(twin)["0", "weight"], before)


@pytest.mark.parametrize("first", [True, False])
def test_a_skipped_step_changes_no_weight_and_no_state(first, monkeypatch):
    optimizer = warm(group((24, 16), (3, 8, 8)))
    if first:
        torch.manual_seed(0)
        optimizer = spectrim.Spectra([group((24, 16))], lr=0.01, rank_ratio=0.1)
        grads_of(optimizer)
    optimizer.param_groups[0]["params"][0].grad[0, 3] = math.nan
    original, flags = steps.by_operators, []

    def on_a_device(entries):
        # As where reading is not free: the flag is a tensor, and nobody knows.
        for entry in entries:
            entry.found = torch.ones(())
            flags.append(entry.found)
        return original(entries)

    monkeypatch.setattr(steps, "by_operators", on_a_device)
    optimizer._prepare()
    before = {key: value.clone() for key, value in tensors(optimizer).items() if key[1] not in ("skipped", "step")}
    with use(True):
        steps.step_entries(optimizer._collect())
    assert flags
    for key, value in before.items():
        assert torch.equal(tensors(optimizer)[key], value), key


def test_what_no_kernel_takes_goes_over_stacks(stacked):
    both(warm(group((24, 16), layout="transposed"), group((16, 24))))
    assert stacked == [2, 2, 1]
    stacked.clear()
    both(warm(group((70, 70), (16, 24)), rank_ratio=0.93))
    assert stacked == [2, 2, 1]
    stacked.clear()
    both(warm(group((24, 16), clip=0.5)))
    both(warm(group((24, 16), shrink=3.0)))
    both(warm(group((24, 16), nesterov=True)))
    assert len(stacked) == 9


def test_two_runs_agree_to_the_bit():
    optimizer = warm(group((80, 24), (33, 40)))
    twins = [copy.deepcopy(optimizer) for _ in range(2)]
    for twin in twins:
        for parameter, other in zip(optimizer.param_groups[0]["params"], twin.param_groups[0]["params"], strict=True):
            other.grad = parameter.grad.clone()
        with use(True):
            twin.step()
    first, second = map(tensors, twins)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_a_compiled_step_is_one_graph():
    optimizer = warm(group((16, 24)))
    optimizer.param_groups[0]["lr"] = torch.tensor(0.01)
    twin = copy.deepcopy(optimizer)
    twin.param_groups[0]["params"][0].grad = optimizer.param_groups[0]["params"][0].grad.clone()
    with use(True):
        torch._dynamo.reset()
        compiled = torch.compile(twin.step, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            optimizer.step()
            compiled()
    for key, value in tensors(optimizer).items():
        torch.testing.assert_close(tensors(twin)[key], value, rtol=0, atol=0)
