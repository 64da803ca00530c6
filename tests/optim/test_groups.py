"""Grouping of plain modules: what decides, what can be declared, and what is refused."""

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import spectrim
from spectrim.optim.grouping.groups import param_groups
from spectrim.optim.grouping.layout import LAYOUTS


class Small(nn.Module):
    """One of everything that has an obvious reading, and a fused projection that the library cannot know."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"qkv": nn.Linear(4, 12), "out": nn.Linear(4, 4)}) for _ in range(2))
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 10, bias=False)


def readings(groups: list[dict[str, Any]]) -> dict[str, tuple[object, ...]]:
    return {name: (g["role"], g["layout"], g["split"]) for g in groups for name, _ in g["params"]}


def values(groups: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (group,) = [group for group in groups if name in dict(group["params"])]
    return {key: value for key, value in group.items() if key != "params"}


def read(module: nn.Module) -> dict[str, tuple[object, ...]]:
    return readings(param_groups(module))


def test_every_trainable_parameter_is_in_exactly_one_group_in_the_order_of_the_model() -> None:
    model = Small()
    model.blocks[0].requires_grad_(False)
    groups = param_groups(model)
    names = [name for group in groups for name, _ in group["params"]]
    expected = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(names) == sorted(expected)
    for group in groups:
        inside = [name for name, _ in group["params"]]
        assert inside == [name for name in expected if name in inside]
        assert all(parameter is model.get_parameter(name) for name, parameter in group["params"])


def test_roles_of_a_plain_model() -> None:
    found = read(Small())
    assert found["embed.weight"] == ("embedding", "matrix", None)
    assert found["blocks.1.qkv.weight"] == ("matrix", "matrix", None)
    assert found["blocks.1.qkv.bias"] == found["norm.weight"] == ("vector", "vector", None)
    assert found["lm_head.weight"] == ("head", "matrix", None)


def test_parameters_that_share_all_values_share_a_group() -> None:
    assert [group["role"] for group in param_groups(Small())] == ["embedding", "matrix", "vector", "head"]


def test_learning_rate_factors_and_weight_decay_of_vectors() -> None:
    groups = param_groups(Small(), embedding_lr=4.0, head_lr=0.5)
    factors = {group["role"]: group["lr_factor"] for group in groups}
    assert factors == {"embedding": 4.0, "matrix": 1.0, "vector": 1.0, "head": 0.5}
    assert {group["role"] for group in groups if group.get("weight_decay") == 0.0} == {"vector"}


def test_groups_are_accepted_by_an_optimizer_of_torch() -> None:
    optimizer = torch.optim.AdamW(param_groups(Small()), lr=1e-3)
    assert optimizer.param_groups[0]["param_names"] == ["embed.weight"]


@pytest.mark.parametrize("head_first", [False, True])
def test_a_tied_weight_is_an_embedding_under_its_first_name(head_first: bool) -> None:
    model = nn.Module()
    embed, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = embed.weight
    for name, module in [("lm_head", head), ("embed", embed)][:: 1 if head_first else -1]:
        model.add_module(name, module)
    assert read(model) == {("lm_head" if head_first else "embed") + ".weight": ("embedding", "matrix", None)}


def test_linear_layers_are_heads_by_name_only_outside_of_numbered_layers() -> None:
    model = nn.Module()
    model.output = nn.Linear(4, 10, bias=False)
    model.value_head = nn.Linear(4, 1, bias=False)
    model.block = nn.ModuleDict({"output": nn.Linear(4, 4, bias=False)})
    model.layers = nn.ModuleList([nn.ModuleDict({"classifier": nn.Linear(4, 3, bias=False)})])
    model.lm_heads = nn.ModuleList([nn.Linear(4, 10, bias=False)])
    roles = {name: reading[0] for name, reading in read(model).items()}
    assert roles == {
        "output.weight": "head",
        "value_head.weight": "head",
        "block.output.weight": "matrix",
        "layers.0.classifier.weight": "matrix",
        "lm_heads.0.weight": "head",
    }


def test_what_the_model_calls_its_output_embeddings_is_a_head() -> None:
    class Named(nn.Sequential):
        def get_output_embeddings(self) -> nn.Module:
            return self[1]

    assert [
        group["role"] for group in param_groups(Named(nn.Linear(4, 4, bias=False), nn.Linear(4, 9, bias=False)))
    ] == [
        "matrix",
        "head",
    ]


def test_convolutions_flatten_by_group_and_depthwise_ones_are_vectors() -> None:
    model = nn.ModuleDict(
        {
            "plain": nn.Conv2d(4, 6, 3, bias=False),
            "grouped": nn.Conv2d(4, 6, 3, groups=2, bias=False),
            "depthwise": nn.Conv1d(4, 4, 3, groups=4, bias=False),
            "mono": nn.Conv1d(1, 4, 3, bias=False),
        }
    )
    assert read(model) == {
        "plain.weight": ("matrix", "flatten", None),
        "grouped.weight": ("matrix", "flatten", (3, 3)),
        "depthwise.weight": ("vector", "vector", None),
        "mono.weight": ("matrix", "flatten", None),
    }


def test_fused_projections_of_torch_itself() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2, bias=False), "gru": nn.GRU(4, 5, bias=False)})
    found = read(model)
    assert found["attention.in_proj_weight"] == ("matrix", "matrix", (4, 4, 4))
    assert found["gru.weight_ih_l0"] == ("matrix", "matrix", (5, 5, 5))


def test_a_parametrized_weight_is_read_as_the_weight() -> None:
    model = nn.ModuleDict({"linear": nn.utils.parametrizations.orthogonal(nn.Linear(4, 4, bias=False))})
    assert list(read(model).values()) == [("matrix", "matrix", None)]
    normed = nn.ModuleDict({"linear": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4, bias=False))})
    assert list(read(normed).values()) == [("vector", "vector", None), ("matrix", "matrix", None)]


class Bare(nn.Module):
    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


def test_plain_parameters_are_read_by_name() -> None:
    model = Bare(
        cls_token=(1, 1, 4), pos_embed=(1, 5, 4), pos_embed_grid=(1, 5, 5, 4), A_log=(4, 2), layer_scale=(4, 1, 1)
    )
    assert read(model) == {
        "cls_token": ("embedding", "stack", None),
        "pos_embed": ("embedding", "stack", None),
        "pos_embed_grid": ("vector", "vector", None),
        "A_log": ("vector", "vector", None),
        "layer_scale": ("vector", "vector", None),
    }


@pytest.mark.parametrize("name", ["mystery", "weight", "query_weight", "token_proj"])
def test_a_parameter_that_nothing_explains_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown role .* {name} \(4, 3\).*overrides=") as error:
        param_groups(Bare(**{name: (4, 3)}))
    assert "'matrix', 'embedding', 'head', 'vector'" in str(error.value)


def test_an_unexplained_parameter_can_be_declared() -> None:
    model = Bare(mystery=(4, 3), stacked=(2, 4, 3))
    groups = param_groups(model, overrides={"*": {"role": "matrix"}})
    assert readings(groups) == {"mystery": ("matrix", "matrix", None), "stacked": ("matrix", "stack", None)}


def test_frozen_parameters_need_no_role() -> None:
    model = Bare(mystery=(4, 3), bias=(3,))
    model.mystery.requires_grad_(False)
    assert list(read(model)) == ["bias"]


def test_declared_splits_apply_to_matrices_and_leave_biases() -> None:
    found = readings(param_groups(Small(), split={"blocks.*.qkv.*": (4, 4, 4)}))
    assert found["blocks.0.qkv.weight"] == ("matrix", "matrix", (4, 4, 4))
    assert found["blocks.0.qkv.bias"] == ("vector", "vector", None)
    assert found["blocks.0.out.weight"] == ("matrix", "matrix", None)


def test_the_first_override_that_matches_wins() -> None:
    overrides = {"blocks.0.*.weight": {"clip": 1.0}, "blocks.*.weight": {"clip": 2.0, "lr_factor": 3.0}}
    groups = param_groups(Small(), overrides=overrides)
    assert values(groups, "blocks.0.qkv.weight")["clip"] == 1.0
    assert values(groups, "blocks.0.qkv.weight")["lr_factor"] == 1.0
    assert values(groups, "blocks.1.qkv.weight")["clip"] == 2.0
    assert values(groups, "blocks.1.qkv.weight")["lr_factor"] == 3.0
    assert "clip" not in values(groups, "lm_head.weight")


def test_overriding_the_role_brings_its_layout_rate_and_decay() -> None:
    overrides = {"blocks.0.out.weight": {"role": "vector"}, "blocks.1.out.weight": {"role": "head"}}
    groups = param_groups(Small(), head_lr=2.0, overrides=overrides)
    assert values(groups, "blocks.0.out.weight") == values(groups, "norm.weight")
    assert values(groups, "blocks.1.out.weight") == values(groups, "lm_head.weight")


def test_an_override_may_name_any_name_of_a_tied_parameter() -> None:
    model = Small()
    model.lm_head.weight = model.embed.weight
    groups = param_groups(model, overrides={"lm_head.weight": {"role": "head"}})
    assert readings(groups)["embed.weight"] == ("head", "matrix", None)


def test_roles_named_in_no_decay_do_not_decay_unless_an_override_says_so() -> None:
    def decays(**options: Any) -> dict[str, float | None]:
        groups = param_groups(Small(), no_decay=("embedding", "head"), **options)
        return {name: group.get("weight_decay") for group in groups for name, _ in group["params"]}

    found = decays()
    assert (found["embed.weight"], found["lm_head.weight"], found["blocks.0.out.weight"]) == (0.0, 0.0, None)
    assert decays(overrides={"lm_head.*": {"weight_decay": 0.3}})["lm_head.weight"] == 0.3
    optimizer = spectrim.create("adamw+clip", Small(), lr=1e-3, weight_decay=0.1, no_decay=("head",))
    assert {g["role"]: g["weight_decay"] for g in optimizer.param_groups} == {
        "matrix": 0.1,
        "embedding": 0.1,
        "head": 0.0,
        "vector": 0.0,
    }


NAMED = [getattr(spectrim, name) for name in ("AdamW", "Signum", "AdEMAMix", "MARS", "Momentum", "Spectra", "Muon")]


@pytest.mark.parametrize("optimizer", NAMED)
def test_every_option_of_a_named_optimizer_can_be_overridden(optimizer: type[torch.optim.Optimizer]) -> None:
    options = optimizer(param_groups(Small()), lr=1e-3).defaults  # type: ignore[call-arg]
    groups = param_groups(Small(), overrides={"*.out.weight": {"peak_lr": 0.5}, "*": options})
    described = optimizer(groups, lr=1.0)  # type: ignore[call-arg]
    assert {group["lr"] for group in described.param_groups} == {1e-3, 1.0}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"no_decay": ("router",)}, r"no_decay=\('router',\): expected a sequence of roles, of 'matrix'"),
    ({"no_decay": "head"}, r"no_decay='head': expected a sequence"),
    ({"overrides": {"blocks.0.qvk.weight": {}}}, r"overrides pattern 'blocks.0.qvk.weight' .* 'blocks.0.qkv.weight'"),
    ({"split": {"*.qvk.weight": (4, 4, 4)}}, r"^split pattern '\*.qvk.weight' matches no parameter"),
    ({"split": {"*.bias": (6, 6)}}, r"split pattern '\*.bias' matches vectors only"),
    ({"split": {"*.qkv.weight": (4, 4)}}, r"'blocks.0.qkv.weight'.*\(4, 4\).*sum to 12"),
    ({"split": {"*.qkv.weight": 3}}, r"split=3 for 'blocks.0.qkv.weight': expected sizes"),
    (
        {"overrides": {"*": {"rolle": "matrix"}}},
        r"unknown key 'rolle' in overrides\['\*'\]: expected one of 'role', 'layout'",
    ),
    (
        {"overrides": {"*": {"role": "router"}}},
        r"role='router' for 'embed.weight': expected one of 'matrix', 'embedding'",
    ),
    (
        {"overrides": {"*.out.weight": {"layout": "rows"}}},
        "layout='rows' for 'blocks.0.out.weight': .*" + repr(LAYOUTS[0]),
    ),
    ({"overrides": {"*.out.weight": {"layout": "stack"}}}, r"'blocks.0.out.weight': .*'stack' needs 3 dimensions"),
    (
        {"overrides": {"*.out.weight": {"layout": "vector"}}},
        r"layout='vector' with role='matrix' for 'blocks.0.out.weight'",
    ),
    ({"overrides": {"norm.weight": {"role": "matrix"}}}, r"layout='vector' with role='matrix' for 'norm.weight'"),
    ({"overrides": {"norm.weight": {"split": (2, 2)}}}, r"split=\(2, 2\) for 'norm.weight': a vector has no outputs"),
    ({"embedding_lr": float("nan")}, r"embedding_lr=nan"),
    ({"head_lr": -1.0}, r"head_lr=-1.0"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_does_not_fit_is_refused_by_name(arguments: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        param_groups(Small(), **arguments)


def test_a_lazy_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("parameter '0.weight' has no shape yet")):
        param_groups(nn.Sequential(nn.LazyLinear(3)))


def test_wrappers_do_not_change_what_a_parameter_is() -> None:
    model = nn.Module()
    model.output = nn.Linear(4, 10, bias=False)
    compiled = torch.compile(model)
    assert read(compiled) == {"_orig_mod.output.weight": ("head", "matrix", None)}  # type: ignore[arg-type]
    parallel = nn.DataParallel(model)
    assert read(parallel) == {"module.output.weight": ("head", "matrix", None)}


class Operator(nn.Module):
    """A neural operator: a layer, and complex weights of its modes."""

    def __init__(self, modes: torch.Tensor) -> None:
        super().__init__()
        self.lift = nn.Linear(4, 4)
        self.modes = nn.Parameter(modes, requires_grad=modes.is_complex() or modes.is_floating_point())


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.complex64, r"'modes' is complex \(torch.complex64\), expected one of torch.float16, .*view_as_complex"),
        (torch.float8_e4m3fn, r"'modes' is quantised \(torch.float8_e4m3fn\), expected .*adapter beside it"),
    ],
)
def test_trainable_weights_that_are_no_real_numbers_are_named(dtype: torch.dtype, message: str) -> None:
    model = Operator(torch.zeros(4, 4, 3).to(dtype))
    for overrides in ({}, {"modes": {"role": "matrix"}}):
        with pytest.raises(ValueError, match=message):
            param_groups(model, overrides=overrides)
    model.modes.requires_grad_(False)
    assert "modes" not in {name for group in param_groups(model) for name, _ in group["params"]}


def test_frozen_integers_are_passed_over() -> None:
    groups = param_groups(Operator(torch.zeros(4, 4, dtype=torch.uint8)))
    assert {name for group in groups for name, _ in group["params"]} == {"lift.weight", "lift.bias"}
