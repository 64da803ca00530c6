"""What ``describe`` says, against values worked out by hand."""

import json
import math

import pytest
import torch
from torch import nn

import spectrim
from spectrim.optim.describe import describe
from spectrim.optim.grouping.groups import param_groups


def model() -> nn.Module:
    return nn.ModuleDict({"embed": nn.Embedding(10, 4), "qkv": nn.Linear(4, 12)})


def stepped(optimizer: torch.optim.Optimizer, module: nn.Module) -> torch.optim.Optimizer:
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def test_rows_say_name_shape_view_rates_and_state() -> None:
    module = model()
    groups = param_groups(module, split={"qkv.*": (4, 4, 4)}, overrides={"embed.*": {"lr": 5e-3}})
    described = describe(stepped(torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1), module))
    embed, qkv, bias = described.rows
    assert (embed.name, embed.shape, embed.role, embed.matrix, embed.lr) == (
        "embed.weight",
        (10, 4),
        "embedding",
        "(10, 4)",
        5e-3,
    )
    assert (qkv.name, qkv.matrix, qkv.rule, qkv.weight_decay) == ("qkv.weight", "3 x (4, 4)", "AdamW", 0.1)
    assert (bias.name, bias.matrix, bias.lr, bias.weight_decay) == ("qkv.bias", "vector", 1e-3, 0.0)
    # Two moments and a step count in float32.
    assert [row.state_bytes for row in described.rows] == [2 * 4 * 40 + 4, 2 * 4 * 48 + 4, 2 * 4 * 12 + 4]
    assert described.state_bytes == sum(row.state_bytes for row in described.rows)
    assert described.parameters == 40 + 48 + 12


@pytest.mark.parametrize(
    ("shape", "layout", "split", "expected"),
    [
        ((4, 12), "transposed", (4, 4, 4), "3 x (4, 4), transposed"),
        ((12, 4), "matrix", (8, 2, 2), "(8, 4) + (2, 4) + (2, 4)"),
        ((5, 12, 4), "stack", None, "5 x (12, 4)"),
        ((5, 12, 4), "stack", (6, 6), "5 x 2 x (6, 4)"),
        ((5, 12, 4), "stack", (8, 4), "5 x [(8, 4) + (4, 4)]"),
        ((5, 4, 12), "transposed_stack", (6, 6), "5 x 2 x (6, 4), transposed"),
        ((6, 3, 2, 2), "flatten", None, "(6, 12), flattened"),
        ((6, 3), "vector", None, "vector"),
    ],
)
def test_logical_matrices_in_words(
    shape: tuple[int, ...], layout: str, split: tuple[int, ...] | None, expected: str
) -> None:
    group = {"params": [nn.Parameter(torch.zeros(shape))], "role": "matrix", "layout": layout, "split": split}
    (row,) = describe(torch.optim.SGD([group], lr=0.1)).rows
    assert row.matrix == expected


def test_an_optimizer_without_names_or_layouts_is_described_by_position() -> None:
    optimizer = torch.optim.SGD(
        [{"params": [torch.zeros(2, 3, requires_grad=True)]}, {"params": torch.zeros(2, requires_grad=True)}], lr=0.5
    )
    first, second = describe(optimizer).rows
    assert (first.name, first.role, first.matrix, first.state_bytes) == ("groups[0].params[0]", "", "", 0)
    assert (second.name, second.shape, second.rule, second.lr) == ("groups[1].params[0]", (2,), "SGD", 0.5)


def test_describing_creates_no_state() -> None:
    optimizer = torch.optim.AdamW(model().parameters())
    describe(optimizer)
    assert len(optimizer.state) == 0


def test_state_in_lists_and_dictionaries_is_counted() -> None:
    parameter = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter] = {
        "history": [torch.zeros(3), {"a": torch.zeros(2, dtype=torch.bfloat16)}],
        "note": "text",
    }
    assert describe(optimizer).state_bytes == 3 * 4 + 2 * 2


def test_a_rule_of_the_optimizer_is_shown() -> None:
    class Ruled(torch.optim.SGD):
        def rule(self, group: dict[str, object], parameter: torch.Tensor) -> str:
            return f"{group['role']} of {parameter.ndim}"

    assert [row.rule for row in describe(Ruled(param_groups(model()), lr=0.1)).rows] == [
        "embedding of 2",
        "matrix of 2",
        "vector of 1",
    ]


def test_tensor_learning_rate_and_json() -> None:
    described = describe(torch.optim.AdamW(param_groups(model()), lr=torch.tensor(0.25)))
    loaded = json.loads(json.dumps(described.to_dict()))
    assert [row["lr"] for row in loaded["rows"]] == [0.25] * 3
    assert loaded["tensors"] == 3
    assert loaded["rows"][0]["shape"] == [10, 4]
    assert loaded["state_bytes"] == 0


def test_prints_as_an_aligned_table_with_totals() -> None:
    lines = str(describe(torch.optim.AdamW(param_groups(model()), lr=1e-3))).splitlines()
    header, rule, *rows, blank, totals = lines
    assert header.split() == ["name", "shape", "role", "matrix", "rule", "lr", "decay", "clip", "state", "bytes"]
    assert set(rule) == {"-"}
    assert len(rows) == 3
    assert len({row.index("AdamW") for row in rows}) == 1
    assert blank == ""
    assert totals == "AdamW: 3 tensors, 100 parameters, 0 bytes of state"


# -- What is told is what happens --------------------------------------------------------------------------------------


class Parts(nn.Module):
    """A parameter of every role and layout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.hidden = nn.Linear(4, 4)
        self.kernel = nn.Conv2d(4, 4, 2)
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 6, bias=False)
        for number, parameter in enumerate(self.parameters()):
            nn.init.constant_(parameter, 1.0 + number)


RECIPES = {
    "adamw": lambda groups, **o: spectrim.AdamW(groups, lr=0.1, **o),
    "adamw+clip": lambda groups, **o: spectrim.AdamW(groups, lr=0.1, clip="auto", **o),
    "adamw+clip of matrices": lambda groups, **o: spectrim.AdamW(groups, lr=0.1, clip=3.0, clip_scope="matrices", **o),
    "adamw+shrink": lambda groups, **o: spectrim.AdamW(groups, lr=0.1, shrink="auto", **o),
    "ademamix+clip": lambda groups, **o: spectrim.AdEMAMix(groups, lr=0.1, clip="auto", **o),
    "signum+clip": lambda groups, **o: spectrim.Signum(groups, lr=0.1, clip="auto", **o),
    "mars": lambda groups, **o: spectrim.MARS(groups, lr=0.1, **o),
    "momentum": lambda groups, **o: spectrim.Momentum(groups, lr=0.1, **o),
    "spectra+clip": lambda groups, **o: spectrim.Spectra(groups, lr=0.1, clip="auto", **o),
    "muon": lambda groups, **o: spectrim.Muon(groups, lr=0.1, **o),
    "wrapped adamw": lambda groups, **o: spectrim.SpectralClipping(torch.optim.AdamW(groups, lr=0.1, **o)),
    "wrapped adamw, matrices": lambda groups, **o: spectrim.SpectralClipping(
        torch.optim.AdamW(groups, lr=0.1, **o), clip_scope="matrices"
    ),
    "wrapped adamw, no clip": lambda groups, **o: spectrim.SpectralClipping(
        torch.optim.AdamW(groups, lr=0.1, **o), clip=None
    ),
    "torch's adamw": lambda groups, **o: torch.optim.AdamW(groups, lr=0.1, **o),
}
GROUPS = {
    "roles": lambda model: param_groups(model, embedding_lr=2.0),
    "roles, a decay for norms": lambda model: param_groups(model, overrides={"norm.*": {"weight_decay": 0.25}}),
    "plain": lambda model: [p for p in model.parameters() if p.ndim < 4],
    "plain, a decay for vectors": lambda model: [
        {"params": [p for p in model.parameters() if 1 < p.ndim < 4]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.25},
    ],
}


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_without_a_gradient_decays_every_parameter_as_described(recipe: str, groups: str) -> None:
    model = Parts()
    optimizer = RECIPES[recipe](GROUPS[groups](model), weight_decay=0.5)
    rows = describe(optimizer).rows
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for row, parameter, old in zip(rows, parameters, before, strict=True):
        expected = old * (1 - row.lr * row.weight_decay)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0, msg=lambda m, row=row: f"{row} {m}")


def test_a_decay_that_is_stated_for_vectors_is_applied_and_the_default_one_is_not() -> None:
    model = Parts()
    overrides = {"norm.weight": {"weight_decay": 0.25}}
    rows = describe(spectrim.AdamW(param_groups(model, overrides=overrides), weight_decay=0.5, clip=1.0)).rows
    decays = {row.name: row.weight_decay for row in rows}
    assert decays["norm.weight"] == 0.25
    assert decays["norm.bias"] == decays["hidden.bias"] == 0.0
    assert decays["hidden.weight"] == decays["embed.weight"] == 0.5


def test_a_stated_decay_of_vectors_survives_a_checkpoint() -> None:
    model = Parts()
    groups = [{"params": [model.norm.weight], "weight_decay": 0.25}, {"params": [model.norm.bias]}]
    saved = spectrim.AdamW(groups, clip="auto").state_dict()
    again = spectrim.AdamW([{"params": [model.norm.weight]}, {"params": [model.norm.bias]}], clip="auto")
    again.load_state_dict(saved)
    assert [row.weight_decay for row in describe(again).rows] == [0.25, 0.0]


@pytest.mark.parametrize("recipe", ["adamw+clip", "adamw+clip of matrices", "wrapped adamw", "wrapped adamw, matrices"])
def test_a_large_update_ends_at_the_described_threshold(recipe: str) -> None:
    model = Parts()
    optimizer = RECIPES[recipe](param_groups(model, embedding_lr=2.0), weight_decay=0.0)
    rows = {row.name: row for row in describe(optimizer).rows}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        # One direction at Adam's full size: √(mn), or √n of a vector, before the clip.
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        row = rows[name]
        moved = (before[name] - parameter.detach()).double().flatten(1 if parameter.ndim > 1 else 0)
        size = torch.linalg.matrix_norm(moved, 2) if moved.ndim == 2 else moved.norm()
        whole = math.sqrt(moved.numel())
        expected = whole if row.threshold is None else whole / math.sqrt(1 + (whole / row.threshold) ** 2)
        if row.threshold is not None and moved.ndim == 2:
            expected *= math.sqrt(max(1.0, moved.shape[0] / moved.shape[1]))
        assert float(size) == pytest.approx(row.lr * expected, rel=2e-3), row


@pytest.mark.parametrize("recipe", ["adamw+clip", "wrapped adamw"])
def test_the_threshold_is_told_for_a_rate_that_no_step_has_had_yet(recipe: str) -> None:
    optimizer = RECIPES[recipe]([nn.Parameter(torch.ones(4, 4))])
    assert describe(optimizer).rows[0].threshold == pytest.approx(0.01 / 0.1)
    optimizer.param_groups[0]["lr"] = 0.4
    assert describe(optimizer).rows[0].threshold == pytest.approx(0.01 / 0.4)


def test_a_frozen_parameter_is_called_frozen_and_does_not_move() -> None:
    layer = nn.Linear(4, 4)
    layer.bias.requires_grad_(False)
    optimizer = spectrim.AdamW(layer.parameters(), weight_decay=0.5)
    row = describe(optimizer).rows[1]
    assert (row.rule, row.lr, row.weight_decay, row.state_bytes) == ("frozen", 0.0, 0.0, 0)


def test_a_decay_that_goes_into_the_gradient_is_said_to() -> None:
    base = torch.optim.Adam(nn.Linear(4, 4).parameters(), lr=0.1, weight_decay=0.5)
    row = describe(spectrim.SpectralClipping(base)).rows[0]
    assert row.rule == "Adam with decay in its gradient → clip"
    assert row.weight_decay == 0.0
