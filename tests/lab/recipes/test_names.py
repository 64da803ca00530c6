import pytest
import torch
from torch import nn

from spectrim.lab.config import OptimizerConfig, TrainConfig
from spectrim.lab.errors import LabError
from spectrim.lab.models.build import build_model
from spectrim.lab.recipes.names import BASES, build_optimizer, defaults_table, parse_recipe, resolve
from spectrim.lab.training.evaluate import evaluation_steps

NAMES = ["adamw", "adamw+clip", "adamw+shrink", "adamw+shrink+clip", "adamw+preclip", "spectra", "spectra+shrink"]
NAMES += ["spectra+clip", "muon", "muon+shrink", "signum+clip", "ademamix+clip", "mars+clip", "momentum+shrink+clip"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_model("tiny", vocabulary_size=300, sequence_length=16, seed=0)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_builds_and_steps(model: nn.Module, name: str) -> None:
    config = resolve(TrainConfig(recipe=name, steps=10))
    optimizer = build_optimizer(model, config)
    model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    group = next(group for group in optimizer.param_groups if group["role"] == "matrix")
    assert group["lr"] == config.optimizer.lr
    assert (group["warmup_steps"], group["total_steps"]) == (1, 10)


def test_multipliers_scale_embeddings_and_head_alone(model: nn.Module) -> None:
    settings = OptimizerConfig(lr=0.01, embedding_lr=4.0, head_lr=2.0)
    optimizer = build_optimizer(model, TrainConfig(recipe="muon", optimizer=settings))
    rates = {group["role"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"matrix": 0.01, "vector": 0.01, "embedding": 0.04, "head": 0.02}


def test_modifiers_are_one_recipe_in_any_order() -> None:
    assert parse_recipe("adamw+clip+shrink").name == "adamw+shrink+clip"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adam", "unknown recipe 'adam': expected base"),
        ("adamw+clp", r"unknown recipe 'adamw\+clp': adamw takes \+shrink, \+preclip, \+clip"),
        ("muon+clip", r"unknown recipe 'muon\+clip': muon takes \+shrink"),
        ("adamw+clip+clip", "stands twice"),
        ("", "unknown recipe ''"),
    ],
)
def test_an_unknown_recipe_is_refused_with_the_choices(name: str, message: str) -> None:
    with pytest.raises(LabError, match=message):
        parse_recipe(name)


def test_defaults_fill_what_is_unset_and_nothing_else() -> None:
    table = defaults_table()
    for base in BASES:
        assert base in table, f"{base} has no default learning rate"
    filled = resolve(TrainConfig(recipe="spectra", optimizer=OptimizerConfig(head_lr=7.0))).optimizer
    assert (filled.lr, filled.embedding_lr, filled.head_lr) == (table["spectra"].lr, table["spectra"].embedding_lr, 7.0)


def test_a_recipe_without_an_entry_takes_the_nearest_plainer_one() -> None:
    table = defaults_table()
    assert "signum+shrink+preclip" not in table
    assert resolve(TrainConfig(recipe="signum+shrink+preclip")).optimizer.lr == table["signum"].lr


def test_initial_weights_depend_on_the_seed_alone_and_leave_the_random_state() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = build_model("tiny", vocabulary_size=300, sequence_length=16, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again = build_model("tiny", vocabulary_size=300, sequence_length=16, seed=1)
    other = build_model("tiny", vocabulary_size=300, sequence_length=16, seed=2)
    weights = [next(iter(model.parameters())) for model in (one, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_evaluations_are_even_and_the_last_is_at_the_end() -> None:
    assert sorted(evaluation_steps(100, 4)) == [25, 50, 75, 100]
    assert sorted(evaluation_steps(3, 24)) == [1, 2, 3]
    assert len(evaluation_steps(320, 24)) == 24
    assert max(evaluation_steps(317, 24)) == 317


@pytest.mark.parametrize(("recipe", "given", "scope"), [
    ("adamw+clip", None, "all"), ("adamw+clip", "matrices", "matrices"), ("spectra+clip", None, "matrices"),
])  # fmt: skip
def test_the_scope_of_clipping_is_the_recipes_own_unless_given(recipe, given, scope):
    config = resolve(TrainConfig(recipe=recipe, optimizer=OptimizerConfig(lr=1e-3, clip_scope=given)))
    optimizer = build_optimizer(nn.Sequential(nn.Linear(4, 4)), config)
    assert {group["clip_scope"] for group in optimizer.param_groups} == {scope}
