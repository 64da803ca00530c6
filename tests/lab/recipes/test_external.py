from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import spectrim
from spectrim.lab.config import OptimizerConfig, TrainConfig
from spectrim.lab.errors import LabError, LabWarning
from spectrim.lab.models.build import build_model
from spectrim.lab.recipes.external import import_class, trust
from spectrim.lab.recipes.names import build_optimizer, parse_recipe, resolve


def small_model() -> nn.Module:
    return build_model("tiny", vocabulary_size=300, sequence_length=16, seed=0)


def step_three_times(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        inputs = torch.randint(300, (2, 8), generator=draw)
        functional.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), inputs.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


def built(recipe: str, model: nn.Module, **settings: object) -> torch.optim.Optimizer:
    config = TrainConfig.parse({"recipe": recipe, "steps": 10, "optimizer": settings}, source="test")
    return build_optimizer(model, resolve(config))


def groups_by_hand(model: nn.Module, *, lr: float, embedding_lr: float, head_lr: float) -> list[dict[str, object]]:
    rates = {"embedding": lr * embedding_lr, "head": lr * head_lr}
    return [
        {
            "params": [parameter for _, parameter in group["params"]],
            "lr": rates.get(group["role"], lr),
            **({"weight_decay": 0.0} if group["role"] == "vector" else {}),
        }
        for group in spectrim.param_groups(model)
    ]


def test_a_class_by_import_path_steps_as_it_does_by_hand() -> None:
    one, two = small_model(), small_model()
    settings = {"lr": 0.01, "embedding_lr": 4.0, "head_lr": 2.0}
    arguments = {"betas": [0.8, 0.9], "eps": 1e-6}
    optimizer = built("torch.optim:NAdam", one, **settings, weight_decay=0.2, arguments=arguments)
    by_hand = torch.optim.NAdam(
        groups_by_hand(two, **settings),
        lr=0.01,
        betas=(0.8, 0.9),
        eps=1e-6,
        weight_decay=0.2,
        decoupled_weight_decay=True,
    )
    assert type(optimizer) is torch.optim.NAdam
    assert "lm_head.weight" in {row.name for row in spectrim.describe(optimizer).rows}
    for mine, theirs in zip(step_three_times(one, optimizer), step_three_times(two, by_hand), strict=True):
        assert torch.equal(mine, theirs)


def test_clip_wraps_the_class_and_bounds_what_a_step_moves() -> None:
    model = small_model()
    optimizer = built("torch.optim:SGD+clip", model, lr=1.0, weight_decay=0.0, clip_bound=1e-3, clip_form="hard")
    assert isinstance(optimizer, spectrim.SpectralClipping)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    functional.cross_entropy(model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits[0], torch.arange(4)).backward()
    optimizer.param_groups[0]["steps_taken"] = 100
    for group in optimizer.param_groups:
        group["warmup_steps"] = 0
    optimizer.step()
    moved = [(parameter - before[name]).detach() for name, parameter in model.named_parameters() if parameter.ndim == 2]
    ratios = [
        float(torch.linalg.matrix_norm(change, 2)) / (1e-3 * max(1, change.shape[0] / change.shape[1]) ** 0.5)
        for change in moved
    ]
    assert max(ratios) == pytest.approx(1.0, rel=0.02)


def test_without_a_learning_rate_it_is_the_class_default() -> None:
    assert resolve(TrainConfig(recipe="torch.optim:NAdam")).optimizer.lr == 2e-3


def test_a_file_beside_the_user_is_an_outside_optimizer_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import torch\nclass Mine(torch.optim.SGD):\n    def __init__(self, params, **options):\n"
    code += "        super().__init__(params, **options)\n"
    (tmp_path / "optimizer_of_mine.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere", *__import__("sys").path])
    trust(["optimizer_of_mine:Mine"])
    # Its own signature says nothing; what it hands on to SGD is read there.
    optimizer = built("optimizer_of_mine:Mine", small_model(), arguments={"momentum": 0.5})
    assert {group["momentum"] for group in optimizer.param_groups} == {0.5}
    assert parse_recipe("optimizer_of_mine:Mine+clip").folder == "optimizer_of_mine.Mine+clip"


class NeedsClosure(torch.optim.SGD):
    def step(self, closure):  # type: ignore[no-untyped-def]
        return closure()


class NoRate(torch.optim.Optimizer):
    def __init__(self, params):  # type: ignore[no-untyped-def]
        super().__init__(params, {})


class Switching(torch.optim.SGD):
    def train(self) -> None: ...

    def eval(self) -> None: ...


class BreaksLater(torch.optim.SGD):
    def step(self, closure=None):  # type: ignore[no-untyped-def]
        raise RuntimeError("out of luck")


class KeepsSecrets(torch.optim.SGD):
    def step(self, closure=None):  # type: ignore[no-untyped-def]
        self.param_groups[0]["secret"] = Path  # a class, which no safe file holds
        return super().step(closure)


@pytest.fixture
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    for stand_in in (NeedsClosure, NoRate, Switching, BreaksLater, KeepsSecrets):
        monkeypatch.setattr(torch.optim, stand_in.__name__, stand_in, raising=False)
    import_class.cache_clear()


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ("torch.optim:X.y", {}, "expected module:Class"),
        ("no_such_module:X", {}, "optimizer 'no_such_module:X': cannot import 'no_such_module'"),
        ("torch.optim:Nadam", {}, "module 'torch.optim' has no 'Nadam'"),
        ("torch.nn:Linear", {}, "expected a class derived from torch.optim.Optimizer"),
        ("../evil:X", {}, "expected module:Class"),
        ("torch.optim:NAdam+shrink", {}, r"torch\.optim:NAdam takes \+clip"),
        ("torch.optim:NeedsClosure", {}, "needs a closure"),
        ("torch.optim:NoRate", {"lr": 1.0}, "takes no learning rate 'lr'"),
        ("torch.optim:Switching", {}, "schedule-free"),
        ("torch.optim:BreaksLater", {}, "cannot step: RuntimeError: out of luck"),
        ("torch.optim:NAdam", {"arguments": {"beta": 1}}, "takes no argument 'beta', expected one of lr, betas"),
        ("torch.optim:NAdam", {"arguments": {"lr": 1}}, r"set optimizer\.lr instead"),
        ("torch.optim:NAdam", {"arguments": {"eps": -1.0}}, "cannot be built: ValueError: Invalid epsilon"),
        ("torch.optim:NAdam", {"beta1": 0.5}, r"optimizer\.arguments\.betas"),
        ("torch.optim:NAdam", {"momentum": 0.5}, "does not have that hyperparameter; its own are arguments"),
        ("adamw", {"arguments": {"eps": 1.0}}, "does not have that hyperparameter; it has none"),
    ],
)
def test_what_cannot_be_served_is_refused_by_its_path(recipe: str, settings: dict[str, object], message: str) -> None:
    trust([recipe])
    with pytest.raises(LabError, match=message):
        built(recipe, small_model(), **settings)


@pytest.mark.usefixtures("_stand_ins")
def test_a_state_that_no_checkpoint_can_hold_is_told_before_the_run() -> None:
    with pytest.warns(LabWarning, match="KeepsSecrets' cannot be read back from a checkpoint"):
        built("torch.optim:KeepsSecrets", small_model())


def test_settings_survive_their_own_file(tmp_path: Path) -> None:
    import tomllib

    config = TrainConfig(
        recipe="torch.optim:NAdam", optimizer=OptimizerConfig(arguments={"betas": (0.8, 0.9), "nested": {"a": 1}})
    )
    assert TrainConfig.parse(tomllib.loads(config.to_toml()), source="test") == config
