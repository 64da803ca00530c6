import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import spectrim
from spectrim.cli import COMMANDS, main
from spectrim.lab.bench.settings import OperatorBench, OptimizerBench, TrainingBench
from spectrim.lab.cli.flags import THEMES, find
from spectrim.lab.config import SharedConfig, TrainConfig
from spectrim.lab.diagnosis.settings import SpectrumConfig
from spectrim.lab.experiments.settings import CompareConfig
from spectrim.lab.planning.settings import PlanConfig
from spectrim.lab.settings import Config


@pytest.fixture
def small_flags(text_folder: Path, cache_dir: Path) -> list[str]:
    flags = ["--data", str(text_folder), "--cache-dir", str(cache_dir), "--preset", "tiny", "--steps", "4"]
    return [*flags, "--batch-size", "2", "--sequence-length", "16", "--vocabulary-size", "300"]


def test_train_then_repeat_from_its_config(
    small_flags: list[str], tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "muon", "--out", str(tmp_path / "one"), "--lr", "0.002", *small_flags]) == 0
    again = ["train", "--config", str(tmp_path / "one" / "config.toml"), "--out", str(tmp_path / "two")]
    capsys.readouterr()
    assert main([*again, "--cache-dir", str(cache_dir), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    first = json.loads((tmp_path / "one" / "result.json").read_text())
    assert result["curve"] == first["curve"]
    assert result["lr"] == 0.002
    assert (tmp_path / "one" / "config.toml").read_text() == (tmp_path / "two" / "config.toml").read_text()


def test_every_setting_has_a_flag_and_the_file_repeats_them(
    small_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--schedule", "wsd", "--accumulate", "2", "--precision", "bf16", "--gradient-clip", "none"]
    flags += ["--set", "schedule.decay=1-sqrt", "--set", "optimizer.beta2=0.98", "--set", "evaluation.times=3"]
    assert main(["train", "adamw", *flags, *small_flags, "--show-config"]) == 0
    shown = capsys.readouterr().out
    settings = tomllib.loads(shown)
    assert settings["schedule"] | {"shape": "wsd", "decay": "1-sqrt"} == settings["schedule"]
    assert (settings["accumulate"], settings["precision"]) == (2, "bf16")
    assert (settings["optimizer"]["gradient_clip"], settings["optimizer"]["beta2"]) == (0.0, 0.98)
    assert settings["evaluation"]["times"] == 3
    (tmp_path / "shown.toml").write_text(shown)
    assert main(["train", "--config", str(tmp_path / "shown.toml"), "--show-config"]) == 0
    assert capsys.readouterr().out == shown


def test_resume_needs_nothing_but_the_folder(small_flags: list[str], tmp_path: Path, cache_dir: Path) -> None:
    out = str(tmp_path / "run")
    assert main(["train", "adamw", "--out", out, *small_flags]) == 0
    assert main(["train", "--out", out, "--resume", "--cache-dir", str(cache_dir)]) == 0


def test_compare_writes_its_folder_and_prints_json(
    small_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--name", "mine", "--runs-dir", str(tmp_path), "--seeds", "3", "--lr", "adamw+clip=0.01", "--json"]
    assert main(["compare", "adamw", "adamw+clip", *flags, *small_flags]) == 0
    printed = json.loads(capsys.readouterr().out)
    stored = json.loads((tmp_path / "mine" / "results.json").read_text())
    assert printed == stored
    assert stored["recipes"]["adamw+clip"]["lr"] == 0.01
    assert (tmp_path / "mine" / "adamw+clip" / "seed-3" / "result.json").exists()


def test_corpus_shows_both_sides(text_folder: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", str(text_folder), "--cache-dir", str(cache_dir), "--vocabulary-size", "300"]
    assert main(["corpus", *flags, "--json"]) == 0
    description = json.loads(capsys.readouterr().out)
    assert description["train"]["documents"] + description["validation"]["documents"] == 8
    assert main(["corpus", *flags]) == 0
    assert "validation" in capsys.readouterr().out


BAD = {
    "missing file": (["train", "adamw", "--out", "o", "--data", "none.txt"], "none.txt"),
    "empty corpus": (["train", "adamw", "--out", "o", "--data", "blank.txt"], "empty corpus"),
    "short text": (["train", "adamw", "--out", "o", "--data", "short.txt"], "one sequence needs 129"),
    "short text compared": (["compare", "adamw", "--data", "short.txt"], "one sequence needs 129"),
    "unknown recipe": (["train", "adam", "--out", "o"], "expected base"),
    "unknown recipe compared": (["compare", "adamw", "lion"], "unknown recipe 'lion'"),
    "recipe twice": (["compare", "adamw", "adamw"], "recipes"),
    "unknown key": (["train", "adamw", "--out", "o", "--config", "bad.toml"], "unknown key 'optimiser'"),
    "not TOML": (["train", "adamw", "--out", "o", "--config", "short.txt"], "is not TOML"),
    "missing config": (["train", "adamw", "--out", "o", "--config", "none.toml"], "none.toml"),
    "negative lr": (["train", "adamw", "--out", "o", "--lr", "-1"], "optimizer.lr=-1.0"),
    "lr that is no number": (["train", "adamw", "--out", "o", "--lr", "fast"], "--lr"),
    "lr without recipe": (["compare", "--lr", "0.1"], "expected RECIPE=VALUE"),
    "negative lr compared": (["compare", "--lr", "adamw=-1"], "lr.adamw=-1.0"),
    "lr of another recipe": (["compare", "adamw", "--lr", "muon=0.1"], "not in this comparison"),
    "no steps": (["train", "adamw", "--out", "o", "--steps", "0"], "steps=0"),
    "seeds": (["compare", "--seeds", "0,x"], "--seeds '0,x'"),
    "seed twice": (["compare", "--seeds", "0,0"], "seeds"),
    "negative seed": (["compare", "--seeds", "-1"], "seeds"),
    "tokenizer": (["train", "adamw", "--out", "o", "--tokenizer", "none.json"], "tokenizer 'none.json': no such file"),
    "model": (["train", "adamw", "--out", "o", "--model", "lama"], "unknown model 'lama'"),
    "weights": (["compare", "adamw", "--weights", "none"], "weights 'none'"),
    "weights and size": (["train", "adamw", "--out", "o", "--weights", ".", "--preset", "1m"], "leave --model and"),
    "weight": (["corpus", "--data", "short.txt@0"], "weight 0 is not a positive number"),
    "preset": (["train", "adamw", "--out", "o", "--preset", "3m"], "expected one of tiny, 1m"),
    "name": (["compare", "--name", "../up"], "--name '../up'"),
    "no recipe": (["train", "--out", "o"], "RECIPE is missing"),
    "no out": (["train", "adamw"], "--out is missing"),
    "schedule": (["train", "adamw", "--out", "o", "--schedule", "step"], "schedule.shape='step': input should be"),
    "precision": (["train", "adamw", "--out", "o", "--precision", "fp8"], "precision='fp8': input should be"),
    "accumulate": (["train", "adamw", "--out", "o", "--accumulate", "3"], "accumulate=3 does not divide"),
    "gradient clip": (["train", "adamw", "--out", "o", "--gradient-clip", "off"], "optimizer.gradient_clip='off'"),
    "unknown setting": (["train", "adamw", "--out", "o", "--set", "schedule.warmup=1"], "key 'schedule.warmup', exp"),
    "setting that is none": (["train", "adamw", "--out", "o", "--set", "steps"], "--set 'steps': expected KEY=VALUE"),
    "setting twice": (["compare", "--steps", "3", "--set", "steps=4"], "--set 'steps=4': steps is given twice"),
    "setting out of range": (["train", "adamw", "--out", "o", "--set", "optimizer.beta1=2"], "optimizer.beta1=2: "),
    "unknown flag": (["train", "adamw", "--stpes", "3"], "--stpes"),
    "unknown command": (["trian"], "trian"),
    "occupied folder": (["train", "adamw", "--out", "."], "not empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_exit_2_and_nothing_written(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "blank.txt").write_text("\n")
    (tmp_path / "short.txt").write_text("a few words, [no more")
    (tmp_path / "bad.toml").write_text("[optimiser]\nlr = 1.0\n")
    files = {"blank.txt", "short.txt", "bad.toml"}
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("spectrim: ")
    assert message in captured.err
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == files


def test_a_missing_dependency_is_told_with_the_command_that_installs_it() -> None:
    # A fresh interpreter in which typer cannot be imported stands for an installation without the extra.
    code = "import sys; sys.modules['typer'] = None; from spectrim.cli import main; sys.exit(main(['compare']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "spectrim: the package 'typer' is missing: pip install 'spectrim[lab]'"


WITHOUT_LAB = """
import sys
from spectrim.cli import LAB_MODULES, main
sys.modules |= dict.fromkeys(LAB_MODULES)
sys.exit(main(sys.argv[1:]))
"""
"""A fresh interpreter that can import no package of the extra "lab"."""


@pytest.mark.parametrize("flags", [["--help"], []])
def test_without_the_lab_help_names_the_commands_and_how_to_install_them(flags: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_LAB, *flags], capture_output=True, text=True, check=True)
    assert "pip install 'spectrim[lab]'" in done.stdout
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_without_the_lab_the_version_is_printed() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_LAB, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == spectrim.__version__


def test_help_of_every_command_is_shown_without_torch() -> None:
    code = """
import sys
from spectrim.cli import COMMANDS, main
bench = [["bench", name] for name in ("operators", "optimizers", "training")]
for command in [[], *([name] for name in COMMANDS), *bench]:
    main([*command, "--help"])
sys.exit("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code.strip()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage:") == 4 + len(COMMANDS)


def test_python_m_spectrim_shows_the_commands() -> None:
    done = subprocess.run([sys.executable, "-m", "spectrim", "--help"], capture_output=True, text=True, check=True)
    for command in ("compare", "train", "corpus", "plan"):
        assert command in done.stdout


def test_plan_is_a_command_and_its_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "tiny", "--recipe", "muon", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == "muon"
    assert main(["plan", "--model", "lama"]) == 2
    assert "unknown model 'lama'" in capsys.readouterr().err


def test_an_interruption_says_how_to_go_on(
    small_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("spectrim.lab.training.loop.evaluate", interrupt)
    assert main(["train", "adamw", "--out", str(tmp_path / "run"), *small_flags]) == 130
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "compare", "sweep", "corpus", "spectrum", "report", "plan"])
def test_help_fits_eighty_columns_and_is_grouped(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "╭─" in shown


PLAIN = [
    (["plan"], PlanConfig),
    (["spectrum"], SpectrumConfig),
    (["bench", "operators"], OperatorBench),
    (["bench", "optimizers"], OptimizerBench),
    (["bench", "training"], TrainingBench),
]


@pytest.mark.parametrize(("command", "model"), PLAIN)
def test_every_setting_of_a_command_without_a_file_has_a_flag_with_its_help_and_default(
    command: list[str], model: type[Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "4000")
    assert main([*command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    fields = {
        key: field
        for section in (model(), *(value for _, value in model() if isinstance(value, Config)))
        for key, field in type(section).model_fields.items()
        if not isinstance(field.default, Config)
    }
    for key, field in fields.items():
        assert field.description, key
        [line] = [line for line in lines if " ".join(field.description.split()).rstrip(".") in line]
        assert field.annotation is bool or "[default: " in line, key


@pytest.mark.parametrize(("command", "model"), [("train", TrainConfig), ("compare", CompareConfig)])
def test_help_shows_words_and_default_of_every_flag_as_its_setting_declares_them(
    command: str, model: type[SharedConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "4000")
    assert main([command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    keys = [key for theme in THEMES.values() for key in theme if key not in ("recipe", "recipes")]
    if command == "compare":
        keys = [key for key in keys if not key.startswith("optimizer.")]  # its rates are by recipe
    found = {key: place for key in keys if (place := find(model, key)) is not None}
    assert len(found) > 15
    for key, (field, default) in found.items():
        assert field.description, key
        [line] = [line for line in lines if field.description and " ".join(field.description.split()) in line][:1]
        declared = (field.json_schema_extra or {}).get("default", default)  # type: ignore[union-attr]
        shown = ",".join(map(str, declared)) if isinstance(declared, tuple) else str(declared or "")
        assert f"[default: {shown}" in line, key
