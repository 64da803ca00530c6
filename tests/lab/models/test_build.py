"""Every kind of model: of a type in a preset's size, of a file, continued from weights; trained, exported, loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from spectrim.lab.config import ModelConfig, TrainConfig
from spectrim.lab.errors import LabError
from spectrim.lab.models.architecture import PRESETS, causal_configuration, name_of, resolve_model
from spectrim.lab.models.build import build_model
from spectrim.lab.settings import read_toml
from spectrim.lab.training.run import prepare, train

TYPES = ("llama", "gpt2", "qwen3", "mixtral", "mamba")


def build(**model: Any) -> Any:
    return build_model(ModelConfig(**model), vocabulary_size=300, sequence_length=16, seed=0)


def tiny_config(config: TrainConfig, steps: int = 3, **model: Any) -> TrainConfig:
    update = {"recipe": "adamw+clip", "steps": steps, "model": ModelConfig(**model)}
    return config.model_copy(update=update)


@pytest.mark.parametrize("architecture", TYPES)
def test_a_type_trains_and_its_export_has_the_same_logits(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path, architecture: str
) -> None:
    config = tiny_config(small_config, preset="tiny", architecture=architecture)
    result = train(config, tmp_path / "run", cache_dir=cache_dir)
    assert result.final_loss is not None
    # Three steps from ln 300 downwards.
    assert 5.0 < result.final_loss < 5.8
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert exported.config.model_type == architecture
    assert exported.config.vocab_size == 300
    trained = build(preset="tiny", architecture=architecture)
    state = torch.load(tmp_path / "run" / "checkpoints" / "step-00000003.pt", weights_only=True)
    trained.load_state_dict(state["model"])
    tokens = torch.arange(32).view(2, 16)
    with torch.no_grad():
        logits = trained.eval()(input_ids=tokens).logits
        assert not torch.equal(logits, build(preset="tiny", architecture=architecture).eval()(input_ids=tokens).logits)
        torch.testing.assert_close(exported(input_ids=tokens).logits, logits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer.eos_token_id == exported.config.eos_token_id == 0


def test_presets_have_the_parameters_that_their_name_says() -> None:
    for name in PRESETS.keys() - {"tiny"}:
        with torch.device("meta"):
            model = build_model(name, vocabulary_size=2048, sequence_length=128, seed=0)
        millions = float(name[:-1]) * (1000 if name.endswith("b") else 1)
        count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        assert 0.7 < count / millions < 1.35, (name, count)


@pytest.mark.parametrize("architecture", [*TYPES, "opt", "falcon", "mamba2", "gpt_oss"])
def test_a_type_has_about_the_size_of_its_preset(architecture: str) -> None:
    with torch.device("meta"):
        model = build_model(
            ModelConfig(preset="90m", architecture=architecture), vocabulary_size=2048, sequence_length=128, seed=0
        )
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert 70 < count < (150 if architecture in ("mixtral", "gpt_oss") else 100)


def test_a_run_of_a_type_resumes_from_its_folder_alone(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path
) -> None:
    model = {"preset": "tiny", "architecture": "gpt2", "overrides": {"n_embd": 16, "summary_type": "mean"}}
    config = tiny_config(small_config, **model)
    train(config, tmp_path / "run", cache_dir=cache_dir)
    stored = TrainConfig.parse(read_toml(tmp_path / "run" / "config.toml"), source="test")
    assert stored == prepare(config)
    exported = transformers.AutoConfig.from_pretrained(tmp_path / "run" / "model")
    assert (exported.n_embd, exported.n_layer, exported.summary_type) == (16, 1, "mean")


@pytest.mark.parametrize("kind", ["json", "folder", "toml"])
def test_a_file_brings_its_own_size(tmp_path: Path, kind: str) -> None:
    settings = {"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 64}
    if kind == "toml":
        path = tmp_path / "model.toml"
        path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    else:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(settings))
    model = build(architecture=str(tmp_path if kind == "folder" else path), overrides={"num_hidden_layers": 3})
    config = model.config
    assert (config.n_embd, config.n_layer, config.n_head, config.n_positions) == (24, 3, 3, 64)
    assert (config.vocab_size, config.eos_token_id, model.dtype) == (300, 0, torch.float32)


def test_weights_are_continued_with_their_own_tokenizer(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path
) -> None:
    first = train(
        tiny_config(small_config, steps=6, preset="tiny", architecture="qwen3"), tmp_path / "one", cache_dir=cache_dir
    )
    data = small_config.data.model_copy(update={"vocabulary_size": None})
    config = tiny_config(small_config, weights=str(tmp_path / "one" / "model")).model_copy(update={"data": data})
    folder = tmp_path / "one" / "model"
    assert prepare(config).data.tokenizer == str(folder)
    exported = transformers.AutoModelForCausalLM.from_pretrained(folder)
    start = build(weights=str(folder))
    for name, parameter in start.named_parameters():
        assert torch.equal(parameter, exported.get_parameter(name))
    second = train(config, tmp_path / "two", cache_dir=cache_dir)
    assert first.final_loss is not None
    assert second.curve.val_loss[0] is not None
    # One step on from where the first ended, on the same tokens, not from ln 300.
    assert second.curve.val_loss[0] < first.final_loss + 0.1
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "two" / "model")
    text = "the people of the union"
    assert again(text).input_ids == transformers.AutoTokenizer.from_pretrained(folder)(text).input_ids


def test_weights_that_changed_do_not_go_on(small_config: TrainConfig, tmp_path: Path) -> None:
    build(preset="tiny").save_pretrained(tmp_path)
    model = resolve_model(ModelConfig(weights=str(tmp_path)))
    assert resolve_model(model) == model
    other = build_model("tiny", vocabulary_size=300, sequence_length=16, seed=1)
    other.save_pretrained(tmp_path)
    with pytest.raises(LabError, match="has changed since this run began"):
        resolve_model(model)


def test_weights_with_a_tensor_missing_are_refused(tmp_path: Path) -> None:
    model = build(preset="tiny")
    state = {name: value for name, value in model.state_dict().items() if "up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(LabError, match=r"are not those of LlamaForCausalLM: missing model\.layers\.0\.mlp\.up_proj"):
        build(weights=str(tmp_path))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"preset": "3m"}, "unknown preset '3m', expected one of tiny, 1m"),
        ({"architecture": "lama"}, "unknown model 'lama', expected a model type .* close to it: llama"),
        ({"architecture": "10m"}, "'10m' is a size, give it as --preset 10m"),
        ({"architecture": "t5"}, "'t5' is no causal language model"),
        ({"architecture": "none/config.json"}, "unknown model 'none/config.json', expected"),
        (
            {"architecture": "gpt2", "overrides": {"n_layers": 3}},
            "gpt2 has no setting 'n_layers'; close to it: n_layer",
        ),
        ({"architecture": "gpt2", "overrides": {"n_layer": "x"}}, "is not a configuration of gpt2: .*n_layer"),
        ({"architecture": "broken.json"}, "not JSON: line 2, column 1"),
        ({"architecture": "typeless.json"}, "names no model_type"),
        ({"architecture": "typeless.json", "preset": "1m"}, "has its own size, leave --preset 1m out"),
        ({"weights": "nowhere"}, "expected a Hugging Face folder with config.json"),
        ({"weights": "nowhere", "preset": "1m"}, "bring their own architecture"),
    ],
)
def test_a_model_that_cannot_be_is_refused_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text('{"model_type": "gpt2",\n')
    (tmp_path / "typeless.json").write_text("{}")
    with pytest.raises(LabError, match=message) as caught:
        resolve_model(ModelConfig(**model))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 299}, "has vocab_size 299, the tokenizer has 300 tokens"),
        ({"n_positions": 15}, "has max_position_embeddings 15, sequence_length is 16"),
        ({"n_embd": 25, "n_head": 2}, "cannot be built: ValueError"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_with_both_sizes(
    tmp_path: Path, settings: dict[str, int], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 1, **settings}))
    with pytest.raises(LabError, match=message):
        build(architecture=str(tmp_path))


def test_a_larger_vocabulary_is_padding_unless_the_tokenizer_is_learned(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 1, "vocab_size": 320}))
    assert build(architecture=str(tmp_path)).config.vocab_size == 320
    with pytest.raises(LabError, match="has vocab_size 320, the tokenizer has 300 tokens; give --vocabulary-size 320"):
        build_model(
            ModelConfig(architecture=str(tmp_path)), vocabulary_size=300, sequence_length=16, seed=0, padded=False
        )


def test_an_encoder_is_made_a_decoder() -> None:
    assert causal_configuration(ModelConfig(preset="tiny", architecture="bert")).is_decoder


def test_a_model_is_called_by_its_size_type_or_place() -> None:
    assert name_of({"preset": "2m"}) == "2m"
    assert name_of({"preset": "2m", "architecture": "gpt2", "weights": None}) == "gpt2 2m"
    assert name_of({"preset": None, "architecture": "/models/small/config.json"}) == "small"
    assert name_of({"weights": "/runs/one/model"}) == "model"
