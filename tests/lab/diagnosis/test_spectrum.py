"""``spectrim spectrum``: what it finds in runs, checkpoints and weights, and what it refuses."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from monitor_records import record
from spectrim.cli import main
from spectrim.lab.config import ModelConfig, TrainConfig
from spectrim.lab.data.batches import Batches
from spectrim.lab.data.tokens import prepare_tokens
from spectrim.lab.diagnosis.gradients import GradientSource
from spectrim.lab.diagnosis.matrices import choose
from spectrim.lab.diagnosis.settings import SpectrumConfig, TextConfig
from spectrim.lab.diagnosis.spectrum import default_out, spectrum, write_spectrum
from spectrim.lab.diagnosis.targets import find_targets
from spectrim.lab.errors import LabError
from spectrim.lab.files import write_json
from spectrim.lab.models.build import build_model
from spectrim.lab.reports.study import report
from spectrim.lab.reports.words import reading_notes, spectrum_headline
from spectrim.lab.training.objective import language_loss
from spectrim.lab.training.run import train

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def run(text_folder: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny model, with a monitor's records beside it."""
    from spectrim.lab.config import DataConfig, EvaluationConfig

    config = TrainConfig(
        recipe="adamw",
        steps=6,
        checkpoint_every=2,
        data=DataConfig(sources=(str(text_folder),), vocabulary_size=300, batch_size=2, sequence_length=16),
        model=ModelConfig(preset="tiny"),
        evaluation=EvaluationConfig(times=3, batches=1),
    )
    folder = tmp_path_factory.mktemp("runs") / "one"
    train(config, folder, cache_dir=cache_dir)
    lines = [json.dumps(record(step, [Q], exact=[Q] if step != 4 else None)) for step in (2, 4, 6)]
    (folder / "monitor.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def measured(run: Path, cache_dir: Path) -> dict[str, Any]:
    return spectrum([run], SpectrumConfig(batches=4, thresholds=(0.05,)), cache_dir=cache_dir)


def command(*words: str | Path) -> int:
    return main(["spectrum", *map(str, words)])


def test_the_numbers_of_a_run_are_those_of_its_weights_momentum_and_gradients(
    run: Path, measured: dict[str, Any], cache_dir: Path
) -> None:
    subject = measured["subjects"]["adamw"]
    assert (subject["kind"], subject["step"], subject["momentum"]) == ("run", 6, "exp_avg")
    assert [each["kind"] for each in subject["matrices"].values()] == [
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    ]
    state = torch.load(run / "checkpoints" / "step-00000006.pt", weights_only=True)
    found = subject["matrices"][Q]
    exact = torch.linalg.svdvals(state["model"][Q].double())
    assert found["weight"]["spectrum"] == pytest.approx(exact.tolist(), rel=1e-4, abs=1e-6)
    places = [
        group["param_names"].index(Q) for group in state["optimizer"]["param_groups"] if Q in group["param_names"]
    ]
    group = next(group for group in state["optimizer"]["param_groups"] if Q in group["param_names"])
    momentum = state["optimizer"]["state"][group["params"][places[0]]]["exp_avg"]
    assert found["momentum"]["norm"] == pytest.approx(float(momentum.norm()), rel=1e-5)

    # Gradients by autograd alone, on the batches after the last one that was trained on.
    config = TrainConfig.parse(state["config"], source="test")
    tokens = prepare_tokens(config.data, cache_dir)
    model = build_model(config.model, vocabulary_size=tokens.vocabulary_size, sequence_length=16, seed=0)
    model.load_state_dict(state["model"])
    batches = Batches(tokens.train, seed=0, batch_size=2, sequence_length=16)
    gradients = []
    for step in range(6, 10):
        model.zero_grad()
        language_loss(model, *batches(step)).backward()
        gradients.append(dict(model.named_parameters())[Q].grad.double().clone())
    stack = torch.stack(gradients)
    mean = torch.linalg.svdvals(stack.mean(0))
    assert found["mean_gradient"]["spectrum"] == pytest.approx(mean.tolist(), rel=1e-3, abs=1e-6)
    assert found["gradient"]["norm"] == pytest.approx(float(stack.square().sum((1, 2)).mean().sqrt()), rel=1e-4)
    pairs = [float((stack[i] * stack[j]).sum()) for i in range(4) for j in range(4) if i != j]
    assert found["mean_gradient"]["energy"]["value"] == pytest.approx(sum(pairs) / 12, rel=1e-3)
    assert found["thresholds"][0]["strength"] == 0.05


def test_stages_are_the_monitors_exact_spectra(measured: dict[str, Any]) -> None:
    stages = measured["subjects"]["adamw"]["stages"]
    assert [stage["step"] for stage in stages] == [2, 6]
    written = record(6, [Q], exact=[Q])["spectra"][Q]["momentum"]
    found = stages[1]["matrices"][Q]["momentum"]
    assert found["spectrum"] == pytest.approx(written, rel=1e-5)
    assert found["spike_share"] == pytest.approx(written[0] ** 2 / sum(value**2 for value in written), rel=1e-4)


def test_the_command_writes_numbers_pictures_words_and_a_page(
    run: Path, tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "spectra"
    flags = ["--batches", "4", "--parameters", "*q_proj*", "--parameters", "*up_proj*", "--cache-dir", cache_dir]
    assert command(run, "--out", out, "--json", *flags) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((out / "spectrum.json").read_text()) == printed
    assert list(printed["subjects"]["adamw"]["matrices"]) == [Q, "model.layers.0.mlp.up_proj.weight"]
    names = {path.name for path in out.iterdir()}
    pictures = {"spikes", "spectra", "directions", "noise", "structure", "tails", "operators"}
    pictures |= {"stages_gradient", "stages_momentum", "stage_shares", "weights", "weight_norms"}
    assert names == {"spectrum.json", "reading.md", "report.html"} | {
        f"{name}.{suffix}" for name in pictures for suffix in ("png", "svg")
    }
    share = printed["subjects"]["adamw"]["matrices"][Q]["gradient"]["spike_share"]
    assert f"{share:.0%}" in (out / "reading.md").read_text()
    assert "4 batches are few" in (out / "reading.md").read_text()
    page = (out / "report.html").read_text()
    assert "Spectra spectra" in page
    assert "Spectra through training" in page
    # Again from the numbers alone, to the byte.
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").read_text() == page
    assert command(run, "--out", out, *flags) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_a_run_is_measured_the_same_twice_and_in_rounds(run: Path, measured: dict[str, Any], cache_dir: Path) -> None:
    # Room for one parameter at a time: the same batches are run again for each.
    again = spectrum([run], SpectrumConfig(batches=4, thresholds=(0.05,), memory=1e-9), cache_dir=cache_dir)
    assert again["subjects"] == measured["subjects"]
    other = spectrum([run], SpectrumConfig(batches=4, seed=1, parameters=(Q,)), cache_dir=cache_dir)
    assert (
        other["subjects"]["adamw"]["matrices"][Q]["gradient"]
        != measured["subjects"]["adamw"]["matrices"][Q]["gradient"]
    )


def test_a_checkpoint_is_measured_as_it_was_then(run: Path, measured: dict[str, Any], cache_dir: Path) -> None:
    path = run / "checkpoints" / "step-00000004.pt"
    summary = spectrum([path, run], SpectrumConfig(batches=4, parameters=(Q,)), cache_dir=cache_dir)
    assert list(summary["subjects"]) == ["adamw at step 4", "adamw"]
    then, now = (subject["matrices"][Q] for subject in summary["subjects"].values())
    weights = torch.load(path, weights_only=True)["model"][Q]
    assert then["weight"]["norm"] == pytest.approx(float(weights.norm()), rel=1e-5)
    assert now["weight"] == measured["subjects"]["adamw"]["matrices"][Q]["weight"]
    assert [stage["step"] for stage in summary["subjects"]["adamw at step 4"]["stages"]] == [2]
    assert default_out([path]) == run.with_name("one-step-00000004-spectrum").absolute()


def test_weights_of_gpt2_are_read_as_the_matrices_they_hold(
    text_folder: Path, run: Path, tmp_path: Path, cache_dir: Path
) -> None:
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    folder = tmp_path / "mine"
    model.save_pretrained(folder)
    for file in (run / "model").glob("tokenizer*"):
        shutil.copy(file, folder)
    text = TextConfig(sources=(str(text_folder),), batch_size=2, sequence_length=16)
    summary = spectrum([folder], SpectrumConfig(batches=4, layers=(1,), data=text), cache_dir=cache_dir)
    subject = summary["subjects"]["mine"]
    shapes = {each["kind"]: tuple(each["shape"]) for each in subject["matrices"].values()}
    assert shapes == {
        **{f"attn.c_attn[{part}]": (16, 16) for part in range(3)},
        "attn.c_proj": (16, 16),
        "mlp.c_fc": (64, 16),
        "mlp.c_proj": (16, 64),
    }
    fused = model.transformer.h[1].attn.c_attn.weight.detach().T
    found = subject["matrices"]["transformer.h.1.attn.c_attn.weight[1]"]
    assert found["weight"]["spectral_norm"] == pytest.approx(float(torch.linalg.matrix_norm(fused[16:32], 2)), rel=1e-4)
    # Dropout is as in training, and yet the same each time.
    again = spectrum([folder], SpectrumConfig(batches=4, layers=(1,), data=text), cache_dir=cache_dir)
    assert again["subjects"] == summary["subjects"]
    assert any("no optimizer state" in line for line in reading_notes(subject))


def test_weights_alone_need_no_text(run: Path, tmp_path: Path, cache_dir: Path) -> None:
    summary = spectrum([run / "model", run], SpectrumConfig(batches=0), cache_dir=cache_dir)
    model, whole = summary["subjects"].values()
    assert [each["weight"] for each in model["matrices"].values()] == [
        each["weight"] for each in whole["matrices"].values()
    ]
    assert whole["matrices"][Q]["momentum"] is not None
    assert spectrum_headline(summary).startswith("Weights alone")
    write_spectrum(summary, tmp_path / "weights")
    assert (tmp_path / "weights" / "weights.png").is_file()
    assert not (tmp_path / "weights" / "noise.png").exists()


def test_gradients_are_held_no_further_than_the_memory_that_is_given(
    small_config: TrainConfig, cache_dir: Path
) -> None:
    tokens = prepare_tokens(small_config.data, cache_dir)
    model = build_model("tiny", vocabulary_size=tokens.vocabulary_size, sequence_length=16, seed=0)
    batches = Batches(tokens.train, seed=0, batch_size=2, sequence_length=16)
    run = []
    source = GradientSource(
        model=model, chosen=choose(model), batches=batches, steps=range(4), memory=4 * 4 * 2 * 32 * 32.0,
        device=torch.device("cpu"), on_batch=lambda: run.append(1),
    )  # fmt: skip
    assert [len(names) for names in source.chunks] == [2, 2, 1, 1, 1]
    assert sum(1 for _ in source.stacks()) == 7
    assert len(run) == 5 * 4
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_text_in_a_name_stays_text_on_the_page(measured: dict[str, Any], tmp_path: Path) -> None:
    injected = "<script>document.title='owned'</script>"
    folder = tmp_path / "x"
    write_json(folder / "spectrum.json", {**measured, "subjects": {injected: measured["subjects"]["adamw"]}})
    report([folder], folder / "report.html")
    page = (folder / "report.html").read_text()
    assert injected not in page
    assert "&lt;script&gt;document.title=" in page


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere"], "'nowhere' does not exist; expected the folder of a run"),
        (["text"], "is none of these; expected the folder of a run"),
        (["run/model"], "is a model without text: name some by --data"),
        (["run", "--batches", "3"], "--batches 3: noise needs at least 4, 0 shows weights alone"),
        (["run", "--parameters", "*qproj*"], "--parameters '*qproj*' matches no matrix of the model"),
        (["run", "--layers", "7"], "--layers 7: the model's layers are 0 to 0"),
        (["run", "--layers", "a"], "--layers 'a': expected whole numbers separated by commas"),
        (["run", "--layers", "0", "--parameters", "*"], "give one of them"),
        (["run", "--threshold", "0"], "thresholds.0=0.0: input should be greater than 0"),
        (["run", "--memory", "0"], "memory=0.0: input should be greater than 0"),
        (["run", "run/model"], "--out is missing"),
        (["run", "run", "--out", "o"], "is given twice"),
        (["begun"], "is not finished and has no checkpoint yet"),
        (["step-00000001.pt"], "cannot be read"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    words: list[str],
    expected: str,
    run: Path,
    text_folder: Path,
    cache_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, target in (("run", run), ("text", text_folder)):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "begun").mkdir()
    shutil.copy(run / "config.toml", tmp_path / "begun")
    (tmp_path / "step-00000001.pt").write_text("no archive")
    before = sorted(tmp_path.iterdir())
    assert command(*words, "--cache-dir", cache_dir) == 2
    assert expected in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_comparison_gives_its_recipes_and_names_are_distinct(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "compared"
    for recipe in ("adamw", "muon"):
        shutil.copytree(run, folder / recipe / "seed-3")
        text = (run / "config.toml").read_text()
        (folder / recipe / "seed-3" / "config.toml").write_text(text.replace('"adamw"', f'"{recipe}"'))
    (folder / "config.toml").write_text('recipes = ["adamw", "muon"]\nseeds = [3, 4]\n')
    assert [subject.name for subject in find_targets([folder])] == ["adamw", "muon"]
    names = [subject.name for subject in find_targets([run, folder / "adamw" / "seed-3"])]
    assert len(set(names)) == 2
    assert all(name.startswith("adamw, seed 0 (") for name in names)
    with pytest.raises(LabError, match="is given twice"):
        find_targets([run, run])


def test_diverged_weights_are_told_by_the_gradient_that_is_not_finite(
    run: Path, tmp_path: Path, cache_dir: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    path = broken / "checkpoints" / "step-00000006.pt"
    state = torch.load(path, weights_only=True)
    state["model"][Q].fill_(math.inf)
    torch.save(state, path)
    with pytest.raises(LabError, match=r"the gradient of .* is not finite on batch 6"):
        spectrum([broken], SpectrumConfig(batches=4, parameters=("*v_proj*",)), cache_dir=cache_dir)
