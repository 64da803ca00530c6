"""A monitor's records against float64 singular value decompositions of what went through the training loop, and that
nothing in training knows of it."""

import copy
import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import spectrim
from spectrim.monitor import Callback, JsonLines
from spectrim.optim.rules.schedule import clip_threshold


class Model(nn.Module):
    """An embedding, a fused projection, a stack of experts, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(40, 24)
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(24)
        self.lm_head = nn.Linear(24, 40, bias=False)

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(24, 48)
        self.experts = nn.Parameter(torch.randn(3, 48, 24) / 5)

    def forward(self, x):
        return x + (self.qkv_proj(x).tanh() @ self.experts).mean(0, keepdim=False) if x.ndim == 2 else x + self.mix(x)

    def mix(self, x):
        return torch.einsum("bth,eho->bto", self.qkv_proj(x).tanh(), self.experts)


GROUPING = {
    "split": {"*qkv_proj.weight": (24, 12, 12)},
    "overrides": {"*experts": {"role": "matrix", "layout": "transposed_stack"}},
}


def setup(make=None):
    torch.manual_seed(0)
    model = Model()
    groups = spectrim.param_groups(model, **GROUPING)
    optimizer = (make or (lambda params: spectrim.AdamW(params, lr=1e-2)))(groups)
    return model, optimizer


def train(model, optimizer, steps, *, clip=None, micro_batches=1, start=0, after=None):
    for number in range(start, start + steps):
        for micro in range(micro_batches):
            tokens = torch.randint(40, (4, 9), generator=torch.Generator().manual_seed(100 * number + micro))
            logits = model(tokens[:, :-1])
            nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        if after is None:
            optimizer.step()
        else:
            after(number + 1, gradients, before, optimizer)
        optimizer.zero_grad()


def matrices_of(name, tensor):
    """The logical matrices of a parameter of the model, by the names that a record has for them."""
    if "qkv_proj" in name:
        return dict(zip([f"{name}[{i}]" for i in range(3)], tensor.split((24, 12, 12)), strict=True))
    return {name: tensor.mT if "experts" in name else tensor}


def oracle(name, gradient, update, weight):
    """What a record should say of one matrix or stack, from the formulas."""
    found = {}
    for kind, X in {"gradient": gradient, "update": update, "weight": weight}.items():
        stack = X.double().reshape(-1, *X.shape[-2:])
        sigma = torch.linalg.svdvals(stack)
        energy = sigma.square().sum(-1)
        k = max(1, round(0.015 * sigma.shape[-1]))
        found[f"{kind}_norm"] = energy.sum().sqrt()
        found[f"{kind}_spectral_norm"] = sigma.max()
        found[f"{kind}_stable_rank"] = (energy / sigma[:, 0] ** 2).mean()
        found[f"{kind}_spike_share"] = sigma[:, :k].square().sum() / energy.sum()
    stack = gradient.double().reshape(-1, *gradient.shape[-2:])
    norms = torch.linalg.matrix_norm(stack, ord=2)
    found["gradient_localisation"] = (stack.abs().amax((-2, -1)) / norms).mean()
    found["update_rms"] = update.double().square().mean().sqrt()
    found["update_to_weight"] = found["update_norm"] / found["weight_norm"]
    del found["weight_spike_share"]
    return found


def test_a_record_is_what_the_formulas_say_of_gradients_before_the_global_clip_and_of_what_moved():
    model, optimizer = setup()
    records, expected = [], {}

    def step(number, gradients, before, optimizer):
        optimizer.step()
        if number == 4:
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    tensors = (gradients[name], parameter.detach().double() - before[name], parameter.detach())
                    for part in zip(*(matrices_of(name, tensor).items() for tensor in tensors), strict=True):
                        expected[part[0][0]] = oracle(part[0][0], *(X for _, X in part))

    with spectrim.SpectralMonitor(model, optimizer, every=4, out=Callback(records.append)):
        train(model, optimizer, 5, clip=0.05, after=step)
    assert [record["step"] for record in records] == [4]
    found = records[0]["parameters"]
    assert found.keys() == expected.keys()
    assert {"embed_tokens.weight", "layers.1.qkv_proj.weight[2]", "layers.0.experts", "lm_head.weight"} <= found.keys()
    for name, quantities in expected.items():
        for quantity, value in quantities.items():
            assert found[name][quantity] == pytest.approx(float(value), rel=5e-3), (name, quantity)
        assert found[name]["gradient_tail_index"] > 0
        assert found[name]["skipped"] == 0
        assert found[name].keys() == {*quantities, "gradient_tail_index", "skipped"}


def test_exact_steps_hold_the_singular_values_of_the_names_asked_for():
    model, optimizer = setup()
    records, expected = [], {}

    def step(number, gradients, before, optimizer):
        optimizer.step()
        name = "lm_head.weight"
        weight = model.lm_head.weight.detach()
        expected[number] = {
            "gradient": gradients[name],
            "momentum": optimizer.state[model.lm_head.weight]["exp_avg"].clone(),
            "update": weight.double() - before[name],
            "weight": weight.clone(),
        }

    monitor = spectrim.SpectralMonitor(
        model, optimizer, 2, out=Callback(records.append), exact_every=4, exact_steps=[3], exact="lm_head*"
    )
    train(model, optimizer, 4, clip=0.05, after=step)
    monitor.close()
    assert [(record["step"], list(record.get("spectra", {}))) for record in records] == [
        (2, []),
        (3, ["lm_head.weight"]),
        (4, ["lm_head.weight"]),
    ]
    for record in records[1:]:
        for kind, X in expected[record["step"]].items():
            sigma = torch.linalg.svdvals(X.double())
            got = torch.tensor(record["spectra"]["lm_head.weight"][kind], dtype=torch.float64)
            assert torch.allclose(got, sigma, rtol=1e-4, atol=float(1e-6 * sigma[0])), kind
        exact = record["parameters"]["lm_head.weight"]
        sigma = torch.linalg.svdvals(expected[record["step"]]["gradient"].double())
        assert exact["gradient_spectral_norm"] == pytest.approx(float(sigma[0]), rel=1e-5)


CLIPPED = {
    "soft": lambda params: spectrim.AdamW(params, lr=1e-2, clip=3.0, clip_scope="all", weight_decay=0.5),
    "hard": lambda params: spectrim.AdamW(params, lr=1e-2, clip=3.0, clip_form="hard", clip_scope="all"),
    "warm-up": lambda params: spectrim.AdamW(
        params, lr=1e-3, peak_lr=1e-2, clip=0.3, warmup_steps=10, clip_scope="all"
    ),
    "wrapper": lambda params: spectrim.SpectralClipping(
        torch.optim.AdamW(params, lr=1e-2, weight_decay=0.5), clip=3.0, clip_scope="all"
    ),
}


@pytest.mark.parametrize("recipe", CLIPPED)
@pytest.mark.parametrize("exact", [(), (3,)])
def test_the_share_above_the_threshold_is_that_of_the_direction_before_its_clip(recipe, exact, monkeypatch):
    """The direction is taken where the optimizer clips it."""
    seen, thresholds = [], []
    clip = "hard_clip" if recipe == "hard" else "soft_clip"
    original = getattr(spectrim.optim.spectral.clip, clip)

    def spied(X, threshold, **options):
        seen.extend((matrix, float(threshold)) for matrix in X.clone().flatten(0, -3).double())
        return original(X, threshold, **options)

    monkeypatch.setattr(spectrim.optim.spectral.clip, clip, spied)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 50, bias=False), nn.Tanh(), nn.Linear(50, 20, bias=False))
    optimizer = CLIPPED[recipe]([{"params": list(model.named_parameters())}])
    records = []
    monitor = spectrim.SpectralMonitor(model, optimizer, 3, out=Callback(records.append), exact_steps=exact)
    for _ in range(3):
        seen.clear()
        thresholds.append(clip_threshold(optimizer.param_groups[0]))
        model(torch.randn(16, 30)).square().mean().backward()
        optimizer.step()
    monitor.close()
    by_shape = {tuple(X.shape): (torch.linalg.svdvals(X) > c).double().mean() for X, c in seen}
    for name, shape in {"0.weight": (50, 30), "2.weight": (20, 50)}.items():
        share = float(by_shape[shape])
        assert 0 < share < 1
        entry = records[0]["parameters"][name]
        assert entry["above_threshold"] == pytest.approx(share, abs=1e-6)
        scale = math.sqrt(max(1, shape[0] / shape[1]))
        limit = optimizer.param_groups[0]["lr"] * float(thresholds[-1]) * scale
        assert entry["update_limit"] == pytest.approx(limit, rel=1e-5)


def test_the_limit_of_a_schedule_counts_steps_as_the_device_does_which_leaves_out_skipped_ones(monkeypatch):
    """As on an accelerator, where the host does not know that a step was skipped."""
    for module in (spectrim.optim.screening.nonfinite, spectrim.optim.optimizer):
        monkeypatch.setattr(module, "reading_is_free", lambda tensor: False)
    used = []
    original = spectrim.optim.spectral.clip.soft_clip

    def spied(X, threshold, **options):
        used.append(float(threshold))
        return original(X, threshold, **options)

    monkeypatch.setattr(spectrim.optim.spectral.clip, "soft_clip", spied)
    weight = nn.Parameter(torch.randn(20, 30))
    options = {"clip": 3.0, "clip_decay": "linear", "clip_decay_fraction": 1.0, "total_steps": 10}
    optimizer = spectrim.AdamW([weight], lr=1e-2, **options)
    model = nn.ParameterList([weight])
    with spectrim.SpectralMonitor(model, optimizer, 4, out=None, kinds="update") as monitor:
        for step in range(4):
            weight.grad = torch.full_like(weight, math.nan) if step == 1 else torch.randn_like(weight)
            optimizer.step()
    assert optimizer.state[weight]["step"] == 3
    assert monitor.last["parameters"]["0"]["update_limit"] == pytest.approx(1e-2 * used[-1], rel=1e-5)


def test_where_nothing_is_clipped_there_is_no_share_above_a_threshold():
    for make in (None, lambda params: spectrim.Muon(params), lambda params: torch.optim.SGD(params, lr=0.1)):
        model, optimizer = setup(make)
        with spectrim.SpectralMonitor(model, optimizer, 1, out=None) as monitor:
            train(model, optimizer, 1)
        assert not any(
            {"above_threshold", "update_limit"} & entry.keys() for entry in monitor.last["parameters"].values()
        )


OPTIMIZERS = {
    "adamw+clip": lambda params: spectrim.AdamW(params, lr=1e-2, clip=1.0, clip_scope="all"),
    "spectra": lambda params: spectrim.Spectra(params, lr=1e-2),
    "wrapper": lambda params: spectrim.SpectralClipping(torch.optim.AdamW(params, lr=1e-2)),
    "torch": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, foreach=False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_the_same_to_the_bit_with_a_monitor_and_without(name):
    found = []
    for watched in (False, True):
        model, optimizer = setup(OPTIMIZERS[name])
        state = torch.get_rng_state()
        if watched:
            monitor = spectrim.SpectralMonitor(model, optimizer, 2, out=None, exact_every=3)
        train(model, optimizer, 7, clip=0.1, micro_batches=2)
        assert torch.equal(state, torch.get_rng_state())
        found.append((model.state_dict(), optimizer.state_dict()))
        if watched:
            monitor.close()
    plain, seen = found
    assert all(torch.equal(plain[0][key], seen[0][key]) for key in plain[0])
    for index, state in plain[1]["state"].items():
        assert state.keys() == seen[1]["state"][index].keys()
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(seen[1]["state"][index][k])) for k, v in state.items()
        )
    assert repr(plain[1]["param_groups"]) == repr(seen[1]["param_groups"])


def test_after_closing_no_hook_is_left():
    model, optimizer = setup()
    monitor = spectrim.SpectralMonitor(model, optimizer, 1, out=None)
    monitor.close()
    monitor.close()
    train(model, optimizer, 1)
    assert monitor.last is None
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_a_watched_model_can_be_copied_and_saved(tmp_path):
    model, optimizer = setup()
    with spectrim.SpectralMonitor(model, optimizer, 1, out=None):
        copied = copy.deepcopy(model)
        torch.save(model, tmp_path / "model.pt")
    assert torch.equal(copied.lm_head.weight, model.lm_head.weight)


def test_the_norm_of_an_accumulated_gradient_is_that_of_the_last_micro_batch():
    model, optimizer = setup()
    norms = []

    def step(number, gradients, before, optimizer):
        norms.append(gradients["lm_head.weight"].norm())
        optimizer.step()

    with spectrim.SpectralMonitor(model, optimizer, 1, out=None) as monitor:
        train(model, optimizer, 1, clip=1e-3, micro_batches=3, after=step)
    assert monitor.last["parameters"]["lm_head.weight"]["gradient_norm"] == pytest.approx(float(norms[0]), rel=1e-5)


def test_records_are_lines_of_a_file_and_a_resumed_run_writes_what_an_uninterrupted_one_does(tmp_path):
    def lines(path):
        return [{k: v for k, v in json.loads(line).items() if k != "ms"} for line in path.read_text().splitlines()]

    model, optimizer = setup()
    with spectrim.SpectralMonitor(model, optimizer, 2, out=tmp_path / "straight.jsonl"):
        train(model, optimizer, 8)

    model, optimizer = setup()
    monitor = spectrim.SpectralMonitor(model, optimizer, 2, out=tmp_path / "resumed.jsonl")
    train(model, optimizer, 5)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), monitor.state_dict()])
    train(model, optimizer, 2, start=5)
    monitor.close()

    model, optimizer = setup()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    sink = JsonLines(tmp_path / "resumed.jsonl", resume_step=5)
    assert [line["step"] for line in lines(sink.path)] == [2, 4]
    with spectrim.SpectralMonitor(model, optimizer, 2, out=sink) as monitor:
        monitor.load_state_dict(saved[2])
        train(model, optimizer, 3, start=5)
    assert [line["step"] for line in lines(sink.path)] == [2, 4, 6, 8]
    assert lines(sink.path) == lines(tmp_path / "straight.jsonl")


def test_a_monitor_resumes_from_its_state_and_goes_on_in_its_file(tmp_path):
    """Its trends too: the jump after the resumption is warned of as in a run that was not interrupted."""

    def jump(number, gradients, before, optimizer):
        if number == 33:
            for parameter in model.parameters():
                parameter.grad *= 1000
        optimizer.step()

    def sgd(params):
        return torch.optim.SGD(params, lr=1e-2)

    def lines(path):
        return [{k: v for k, v in json.loads(line).items() if k != "ms"} for line in path.read_text().splitlines()]

    straight, parts = tmp_path / "straight.jsonl", tmp_path / "parts.jsonl"
    model, optimizer = setup(sgd)
    with spectrim.SpectralMonitor(model, optimizer, 25, out=straight):
        train(model, optimizer, 40, after=jump)
    assert 33 in [record["step"] for record in lines(straight)]

    model, optimizer = setup(sgd)
    with spectrim.SpectralMonitor(model, optimizer, 25, out=parts) as monitor:
        train(model, optimizer, 30, after=jump)
        saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), monitor.state_dict()])
        train(model, optimizer, 9, start=30, after=jump)
    model, optimizer = setup(sgd)
    with pytest.raises(FileExistsError):
        spectrim.SpectralMonitor(model, optimizer, 25, out=parts)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    with spectrim.SpectralMonitor(model, optimizer, 25, out=parts, resume=saved[2]) as monitor:
        assert monitor.steps_taken == 30
        train(model, optimizer, 10, start=30, after=jump)
    assert lines(parts) == lines(straight)


def test_counts_of_skipped_steps_in_the_optimizer_s_state_are_told_and_go_on_with_it():
    class Counting(torch.optim.SGD):
        """Counts in its state, as every optimizer of this library is to."""

        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    bad = ~parameter.grad.isfinite().all()
                    parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
                    state = self.state[parameter]
                    state["skipped"] = state.get("skipped", torch.tensor(0)) + bad
            super().step(closure)

    def run(model, optimizer, monitor):
        for bad in (True, False, True):
            model(torch.randn(2, 3)).sum().backward()
            model.bias.grad[0] = math.nan if bad else 1.0
            optimizer.step()
            optimizer.zero_grad()
        return monitor.last["skipped"]

    model = nn.Linear(3, 4)
    optimizer = Counting(model.parameters(), lr=0.1)
    with spectrim.SpectralMonitor(model, optimizer, 1, out=None) as monitor:
        assert run(model, optimizer, monitor) == 2
        state = copy.deepcopy([optimizer.state_dict(), monitor.state_dict()])
    assert state[1]["skips"]["group 0, parameter 1"] == 2
    optimizer = Counting(model.parameters(), lr=0.1)
    optimizer.load_state_dict(state[0])
    with spectrim.SpectralMonitor(model, optimizer, 1, out=None, resume=state[1]) as monitor:
        assert run(model, optimizer, monitor) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every=0"),
        ({"exact": "*nothing*"}, "'.nothing.' matches no matrix.*embed_tokens"),
        ({"kinds": ("gradients",)}, "'gradients'.*'gradient', 'momentum', 'update', 'weight'"),
        ({"exact_every": -1}, "exact_every=-1"),
        ({"rank_ratio": 0.0}, "rank_ratio=0.0"),
        ({"alarm": 5}, "alarm=5"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options, message):
    model, optimizer = setup()
    with pytest.raises(ValueError, match=message):
        spectrim.SpectralMonitor(model, optimizer, **{"out": None, **options})
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_a_file_that_is_refused_leaves_no_hook(tmp_path):
    (tmp_path / "monitor.jsonl").write_text("mine\n")
    model, optimizer = setup()
    with pytest.raises(FileExistsError):
        spectrim.SpectralMonitor(model, optimizer, out=tmp_path / "monitor.jsonl")
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert not optimizer._optimizer_step_pre_hooks


def test_a_skipped_step_is_counted_and_its_numbers_are_null():
    model, optimizer = setup()
    with spectrim.SpectralMonitor(model, optimizer, 1, out=None) as monitor:
        for bad in (False, True):
            model(torch.randint(40, (2, 5))).square().mean().backward()
            if bad:
                model.lm_head.weight.grad[0, 0] = math.nan
            optimizer.step()
    entry = monitor.last["parameters"]["lm_head.weight"]
    assert monitor.last["skipped"] == entry["skipped"] == 1
    assert entry["gradient_spectral_norm"] is None
    assert entry["update_norm"] == 0
    assert monitor.last["parameters"]["embed_tokens.weight"]["skipped"] == 0
    json.dumps(monitor.last, allow_nan=False)


def test_the_example_runs(tmp_path, capsys):
    path = Path(__file__).parents[2] / "examples" / "monitor.py"
    runpy.run_path(str(path))["main"](tmp_path, steps=10)
    told = capsys.readouterr().out
    assert "step 10: " in told
    assert all(f"{kind}: " in told for kind in ("gradient", "momentum", "update", "weight"))
