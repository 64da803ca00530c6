"""What ``describe`` says, against values worked out by hand."""

import json

import pytest
import torch
from torch import nn

from spectrim.optim.describe import describe
from spectrim.optim.groups import param_groups


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
    assert header.split() == ["name", "shape", "role", "matrix", "rule", "lr", "decay", "state", "bytes"]
    assert set(rule) == {"-"}
    assert len(rows) == 3
    assert len({row.index("AdamW") for row in rows}) == 1
    assert blank == ""
    assert totals == "AdamW: 3 tensors, 100 parameters, 0 bytes of state"
