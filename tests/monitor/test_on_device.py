"""What a monitor asks of an accelerator: few kernels, no waiting, and records that come later but are the same."""

import pytest
import torch
from torch import nn

import fake_cuda
import spectrim
from spectrim.monitor import fetch

#: The matrices of GPT-2 small: 48.
SHAPES = [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12


class Event:
    """Complete after so many questions, or once it is waited for."""

    waited = 0

    def __init__(self, questions: int) -> None:
        self.questions = questions

    def query(self) -> bool:
        self.questions -= 1
        return self.questions < 0

    def synchronize(self) -> None:
        Event.waited += self.questions >= 0


@pytest.fixture
def late(monkeypatch):
    """Copies to the host arrive some steps late."""

    def begin_copy(tensor):
        return torch.empty_like(tensor, device="cpu").copy_(tensor, non_blocking=True), Event(3)

    monkeypatch.setattr(fetch, "begin_copy", begin_copy)
    monkeypatch.setattr(Event, "waited", 0)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("lr", ["a number", "a tensor"])
def test_a_step_that_is_not_measured_launches_a_handful_of_kernels_and_none_waits(lr, late):
    found: dict[bool, list[tuple[int, int]]] = {}
    with fake_cuda.counted() as counter:
        for watched in (False, True):
            model = nn.ParameterList([nn.Parameter(torch.empty(shape, device="cuda")) for shape in SHAPES])
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
            if lr == "a tensor":
                optimizer.param_groups[0]["lr"] = torch.empty((), device="cuda")
            if watched:
                spectrim.SpectralMonitor(model, optimizer, 12, out=None)
            found[watched] = []
            for _ in range(13):
                for parameter in model:
                    parameter.grad = torch.empty_like(parameter)
                counter.clear()
                optimizer.step()
                found[watched].append((counter.launches.total(), counter.waits.total()))
    ours = [(a - b, c - d) for (a, c), (b, d) in zip(found[True], found[False], strict=True)]
    # The first step looks at the weights' memory, the tenth begins a copy, and the twelfth is measured.
    others = [kernels for kernels, _ in (*ours[1:11], ours[12])]
    assert 100 < ours[11][0] <= 720
    assert 3 <= max(others) <= 20
    # One copies the samples; one more the learning rate that is in a tensor.
    assert sorted(others)[len(others) // 2] <= 2
    assert [waits for _, waits in ours[1:]] == [0] * 12


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 40))
    return model, torch.optim.SGD(model.parameters(), lr=1e-2)


def records(steps: int, *, at=None):
    """What a sink got of a run with a jump, and what it had got before the monitor was closed."""
    model, optimizer = network()
    told = []
    with spectrim.SpectralMonitor(model, optimizer, 15, out=told.append) as monitor:
        for step in range(1, steps + 1):
            model(torch.randn(64, 40)).square().mean().backward()
            if step == 33:
                model[2].weight.grad *= 100
            optimizer.step()
            optimizer.zero_grad()
            if step == at:
                monitor.state_dict()
                return [record["step"] for record in told]
        before = len(told)
    return [{key: value for key, value in record.items() if key != "ms"} for record in told], before


def test_what_arrives_late_is_told_later_without_waiting_and_is_the_same(late, monkeypatch):
    later, before = records(47)
    # Step 45 is measured, and its copy is still under way after 47; so is that of steps 46 and 47, begun at the end.
    assert Event.waited == 2
    assert before == len(later) - 1
    monkeypatch.undo()
    at_once, _ = records(47)
    assert [record["step"] for record in at_once] == [15, 30, 33, 45]
    assert later == at_once


def test_the_state_of_a_monitor_is_taken_when_all_records_are_told(late):
    assert records(47, at=45) == [15, 30, 33, 45]


def test_only_a_step_that_is_measured_has_hooks_on_gradients():
    model, optimizer = network()
    hooked = []
    with spectrim.SpectralMonitor(model, optimizer, 3, out=None):
        for _ in range(7):
            hooked.append(bool(model[0].weight._post_accumulate_grad_hooks))
            model(torch.randn(8, 40)).sum().backward()
            optimizer.step()
    assert hooked == [False, False, True, False, False, True, False]


def test_weights_that_change_between_steps_are_no_part_of_an_update():
    model, optimizer = network()
    seen = {}
    with spectrim.SpectralMonitor(model, optimizer, out=None, alarm=lambda step, v: seen.update({step: v["2.weight"]})):
        for _ in range(3):
            model(torch.randn(8, 40)).sum().backward()
            with torch.no_grad():
                model[2].weight.mul_(3.0)
            before = model[2].weight.detach().clone()
            optimizer.step()
            moved = model[2].weight.detach() - before
    assert seen[3]["update_rms"] == pytest.approx(float(moved.square().mean().sqrt()), rel=0.1)


def test_weights_that_get_other_memory_between_steps_that_are_read_together_are_followed():
    weight = nn.Parameter(torch.randn(1100, 1100))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    model = nn.ParameterList([weight])
    seen, expected = {}, {}
    with spectrim.SpectralMonitor(
        model, optimizer, out=None, alarm=lambda step, values: seen.update({step: values["0"]["update_rms"]})
    ):
        for step in range(1, 8):
            if step == 3:
                weight.data = weight.data.clone()
            if step == 5:
                # Neither its rows nor its columns are contiguous any more: other entries are sampled, another number.
                weight.data = torch.randn(1100, 1200)[:, :1100]
            weight.grad = step * torch.randn(1100, 1100)
            optimizer.step()
            expected[step] = float(step)
        assert not seen
    assert seen == pytest.approx(expected, rel=0.1)
