from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrim.lab.config import DataConfig, MonitorConfig, OptimizerConfig, TrainConfig
from spectrim.lab.errors import LabError
from spectrim.lab.experiments.settings import CompareConfig
from spectrim.lab.files import write_text
from spectrim.lab.settings import differences, read_toml

# What UTF-8 can carry; a path may hold anything of it.
PATHS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(st.lists(PATHS, max_size=3), st.floats(1e-12, 1e3), st.integers(0, 2**63 - 1))
def test_a_run_comes_back_from_toml_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, sources: list[str], lr: float, seed: int
) -> None:
    config = TrainConfig(
        recipe="muon", seed=seed, data=DataConfig(sources=tuple(sources)), optimizer=OptimizerConfig(lr=lr)
    )
    file = tmp_path_factory.getbasetemp() / "config.toml"
    write_text(file, config.to_toml())
    assert TrainConfig.parse(read_toml(file), source="test") == config


def test_a_comparison_comes_back_from_toml_as_it_was(tmp_path: Path) -> None:
    config = CompareConfig(recipes=("adamw", "adamw+clip"), seeds=(0, 3), lr={"adamw+clip": 5e-3})
    write_text(tmp_path / "config.toml", config.to_toml())
    assert CompareConfig.parse(read_toml(tmp_path / "config.toml"), source="test") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"recipe": "adamw", "stpes": 3}, "unknown key 'stpes', expected one of steps"),
        ({"recipe": "adamw", "optimizer": {"lrr": 3}}, "unknown key 'optimizer.lrr', expected one of lr, embedding_lr"),
        ({"recipe": "adamw", "optimizer": {"lr": -1.0}}, "optimizer.lr=-1.0: input should be greater than 0"),
        ({"recipe": "adamw", "optimizer": {"lr": float("nan")}}, "optimizer.lr=nan"),
        ({"recipe": "adamw", "steps": 0}, "steps=0"),
        ({"steps": 3}, "key 'recipe' is missing"),
    ],
)
def test_an_error_names_file_key_value_and_choices_in_one_line(values: dict[str, object], message: str) -> None:
    with pytest.raises(LabError) as caught:
        TrainConfig.parse(values, source="config 'x.toml'")
    assert message in str(caught.value)
    assert str(caught.value).startswith("config 'x.toml': ")
    assert "\n" not in str(caught.value)


def test_differences_are_named_by_dotted_key() -> None:
    one = TrainConfig(recipe="adamw")
    two = one.model_copy(update={"optimizer": OptimizerConfig(lr=0.1), "seed": 2})
    assert {key: (old, new) for key, old, new in differences(one, two)} == {
        "optimizer.lr": (None, 0.1),
        "seed": (0, 2),
    }


def test_the_page_on_training_has_every_setting_of_schedule_evaluation_monitor_and_loop() -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    config = TrainConfig(recipe="adamw").model_dump()
    plain = [key for key, value in config.items() if not isinstance(value, dict) and key != "recipe"]
    nested = [f"{table}.{key}" for table in ("schedule", "evaluation", "monitor") for key in config[table]]
    assert [key for key in plain + nested if f"| `{key}` |" not in page] == []


@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [(5, None, 20), (320, None, 20), (800, None, 50), (10**5, None, 100), (320, 7, 7), (9, 0, 0)],
)
def test_a_run_is_measured_sixteen_times_unless_told_otherwise(steps: int, every: int | None, expected: int) -> None:
    config = TrainConfig(recipe="adamw", steps=steps, monitor=MonitorConfig(every=every))
    assert config.measured_every == expected
