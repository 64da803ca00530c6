"""Folders of others: what they name is read and never run, and what is mailed tells no folder of this machine."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from spectrim.cli import main
from spectrim.lab.config import ModelConfig, TrainConfig
from spectrim.lab.data.shards import open_shards
from spectrim.lab.errors import LabError
from spectrim.lab.models.architecture import causal_configuration
from spectrim.lab.models.build import build_model
from spectrim.lab.recipes import external
from spectrim.lab.reports.shareable import shareable, short

FOREIGN = "foreign_optimizer"
RECIPE = f"{FOREIGN}:Opt"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with a module in it that leaves a file behind when it is imported."""
    ran = tmp_path / "ran"
    code = f"import pathlib, torch\npathlib.Path({str(ran)!r}).touch()\nclass Opt(torch.optim.SGD):\n    pass\n"
    (tmp_path / f"{FOREIGN}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    sys.modules.pop(FOREIGN, None)
    external.import_class.cache_clear()


def settings(config: TrainConfig) -> str:
    return config.model_copy(update={"recipe": RECIPE}).to_toml()


def was_run(folder: Path) -> bool:
    return (folder / "ran").exists()


def test_a_recipe_that_only_a_file_names_is_not_imported(
    folder: Path, small_config: TrainConfig, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "config.toml").write_text(settings(small_config))
    shared = f'recipes = ["{RECIPE}"]\nsteps = 2\n'
    (folder / "shared.toml").write_text(shared)
    (folder / "runs" / "tuned").mkdir(parents=True)
    (folder / "runs" / "tuned" / "config.toml").write_text(shared)
    for line in (
        "train --config run/config.toml --show-config",
        "train --config run/config.toml --out new",
        "train --out run --resume",
        "compare --config shared.toml",
        "sweep --config shared.toml --name fresh",
        "sweep --name tuned",
        "train adamw --out new --set recipe='x'",
    ):
        assert main([*line.split(), "--cache-dir", str(cache_dir)]) == 2, line
        assert "Traceback" not in capsys.readouterr().err
    assert not was_run(folder)
    assert not (folder / "new").exists()
    assert main(["train", "--config", "run/config.toml", "--show-config"]) == 2
    assert f"recipe {RECIPE!r} runs code of the module {FOREIGN!r}" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[RECIPE], [f"{RECIPE}+clip"], ["--trust-recipes"], ["--set", f"recipe={RECIPE}"]])
def test_what_the_command_line_names_is_imported(folder: Path, small_config: TrainConfig, words: list[str]) -> None:
    (folder / "config.toml").write_text(settings(small_config))
    assert main(["train", *words, "--config", "config.toml", "--show-config"]) == 0
    assert was_run(folder)


def test_naming_one_recipe_trusts_no_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "shared.toml").write_text(f'recipes = ["torch.optim:NAdam"]\n\n[lr]\n"{RECIPE}" = 0.1\n')
    assert main(["compare", "torch.optim:SGD", "--config", "shared.toml", "--show-config"]) in (0, 2)
    assert not was_run(folder)
    # And a command trusts nothing for the one after it.
    assert main(["train", RECIPE, "--show-config", "--lr", "0.1"]) == 0
    with pytest.raises(LabError, match="named in a file alone"):
        external.load_class(RECIPE)


def test_reading_a_run_imports_nothing_and_finds_its_momentum(
    folder: Path, small_config: TrainConfig, cache_dir: Path
) -> None:
    data = small_config.data.sources[0]
    arguments = ["--data", data, "--lr", "0.1", "--preset", "tiny", "--vocabulary-size", "300", "--batch-size", "2"]
    arguments += ["--sequence-length", "16", "--steps", "2", "--cache-dir", str(cache_dir)]
    override = f"{RECIPE}.arguments.momentum=0.9"
    rates = ["--lr", f"{RECIPE}=0.1", "--override", override]
    shared = [word for word in arguments if word not in ("--lr", "0.1")]
    assert main(["compare", RECIPE, *rates, *shared]) == 0
    assert was_run(folder)
    (folder / "ran").unlink()
    forget()
    assert main(["report", "runs/default"]) == 0
    page = (folder / "runs" / "default" / "report.html").read_text(encoding="utf-8")
    assert "Opt: 12 tensors" in page  # the plan that the run stored
    assert main(["spectrum", "runs/default", "--batches", "0", "--out", "spectra"]) == 0
    found = json.loads((folder / "spectra" / "spectrum.json").read_text(encoding="utf-8"))["subjects"][RECIPE]
    assert found["momentum"] == "momentum_buffer"
    assert all(matrix["momentum"]["norm"] > 0 for matrix in found["matrices"].values())
    # A run that is asked to go on says what it would run, and goes on once that is named.
    run = f"runs/default/{RECIPE.replace(':', '.')}/seed-0"
    assert main(["train", "--out", run, "--resume"]) == 2
    assert not was_run(folder)
    assert main(["train", RECIPE, "--out", run, "--resume", "--cache-dir", str(cache_dir)]) == 0
    # What is mailed holds no folder of this machine.
    for file in ("runs/default/report.html", "runs/default/summary.md", "spectra/report.html", "spectra/reading.md"):
        text = (folder / file).read_text(encoding="utf-8")
        for place in (str(folder), str(Path(data).parent), str(cache_dir)):
            assert place not in text, file
    assert Path(data).name in page


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("/home/me/secret/books", "books"),
        ("/home/me/secret/books/*.txt@0.5", "books/*.txt@0.5"),
        ("/data/**/x.jsonl", "data/**/x.jsonl"),
        ("~/notes.txt", "notes.txt"),
        ("C:\\Users\\me\\notes.txt", "notes.txt"),
        ("hub:owner/name:sub", "hub:owner/name:sub"),
        ("books/a.txt", "books/a.txt"),
        ("torch.optim:NAdam", "torch.optim:NAdam"),
    ],
)
def test_a_place_is_told_by_its_name(place: str, told: str) -> None:
    assert short(place) == told
    assert shareable({"a": [place], "b": f"weights {place!r} cannot be read", "c": 1})["a"] == [told]


def test_a_place_in_a_sentence_is_cut_too() -> None:
    assert shareable("weights '/home/me/run/model' cannot be read") == "weights 'model' cannot be read"


def test_a_checkpoint_that_holds_code_is_refused_by_the_spectrum(
    folder: Path, small_config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    class Evil:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return Path.touch, (folder / "ran",)

    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.toml").write_text(small_config.to_toml())
    torch.save(
        {"format": "spectrim-checkpoint-2", "step": 2, "model": Evil()}, run / "checkpoints" / "step-00000002.pt"
    )
    assert main(["spectrum", "run", "--batches", "0"]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert not was_run(folder)


def test_weights_that_hold_code_are_refused(folder: Path) -> None:
    class Evil:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return Path.touch, (folder / "ran",)

    model = build_model("tiny", vocabulary_size=300, sequence_length=16, seed=0)
    model.save_pretrained(folder / "model")  # type: ignore[operator]
    (folder / "model" / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil()}, folder / "model" / "pytorch_model.bin")
    with pytest.raises(LabError, match=r"weights '.*model' cannot be read"):
        build_model(ModelConfig(weights=str(folder / "model")), vocabulary_size=300, sequence_length=16, seed=0)
    assert not was_run(folder)


def test_weights_beside_code_of_their_own_are_read_without_it(folder: Path) -> None:
    model = build_model("tiny", vocabulary_size=300, sequence_length=16, seed=0)
    weights = folder / "model"
    model.save_pretrained(weights)  # type: ignore[operator]
    (weights / "modeling.py").write_text((folder / f"{FOREIGN}.py").read_text() + "\nclass Mine: ...\n")
    file = weights / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}))
    read = build_model(ModelConfig(weights=str(weights)), vocabulary_size=300, sequence_length=16, seed=1)
    assert torch.equal(read.state_dict()["lm_head.weight"], model.state_dict()["lm_head.weight"])
    assert not was_run(folder)
    file.write_text(json.dumps({**config, "attn_implementation": "somebody/kernels"}))
    with pytest.raises(LabError, match="attn_implementation='somebody/kernels' is code from the hub"):
        causal_configuration(ModelConfig(weights=str(weights)))


def test_shards_of_objects_are_refused(folder: Path) -> None:
    (folder / "shards.json").write_text('{"vocabulary_size": 300, "end_of_document": 0}')
    np.save(folder / "val.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(LabError, match=r"val\.npy' is not a \.npy file"):
        open_shards(folder, 0.1)
