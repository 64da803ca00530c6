"""Finds the transformers configuration of a preset, a model type or a file. A preset is a size, in the shape of Llama
or of another model type; a file has its own size. Builds no weights and uses no network.
"""

import difflib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from spectrim.lab.config import ModelConfig
from spectrim.lab.errors import LabError
from spectrim.lab.files import parse_json
from spectrim.lab.huggingface import quiet_transformers
from spectrim.lab.paths import named_path
from spectrim.lab.settings import read_toml

__all__ = ["PRESETS", "Preset", "causal_configuration", "check_preset", "name_of", "resolve_model"]

DEFAULT_PRESET = "2m"
DEFAULT_TYPE = "llama"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A size, as the shape of a Llama-like model; heads are 64 wide, except in the tiny one."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int


PRESETS = {
    "tiny": Preset(hidden_size=32, intermediate_size=64, layers=1, heads=1),
    "1m": Preset(hidden_size=128, intermediate_size=384, layers=3, heads=2),
    "2m": Preset(hidden_size=192, intermediate_size=512, layers=4, heads=3),
    "10m": Preset(hidden_size=384, intermediate_size=1024, layers=6, heads=6),
    "25m": Preset(hidden_size=512, intermediate_size=1408, layers=8, heads=8),
    "90m": Preset(hidden_size=768, intermediate_size=2048, layers=12, heads=12),
    "200m": Preset(hidden_size=1024, intermediate_size=2816, layers=16, heads=16),
    "400m": Preset(hidden_size=1280, intermediate_size=3456, layers=20, heads=20),
    "1b": Preset(hidden_size=2048, intermediate_size=5632, layers=20, heads=32),
}

RESHAPED: dict[str, Callable[[Preset], dict[str, Any]]] = {
    # Dropout would hide differences between optimizers, and one pass over the text does not need it.
    "gpt2": lambda _: {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    # Four experts of half the width, two of them for each token: a dense model's work with twice its weights.
    "mixtral": lambda size: {"num_local_experts": 4, "intermediate_size": size.intermediate_size // 2},
    "qwen3_moe": lambda size: {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": size.intermediate_size // 2,
    },
    "gpt_oss": lambda size: {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": size.intermediate_size // 2,
    },
    "opt": lambda size: {"ffn_dim": 4 * size.hidden_size, "word_embed_proj_dim": size.hidden_size, "dropout": 0.0},
    # A Mamba block has half of a transformer layer's weights, and a width of its own.
    "mamba": lambda size: {"num_hidden_layers": 2 * size.layers, "intermediate_size": 2 * size.hidden_size},
    "falcon_mamba": lambda size: {"num_hidden_layers": 2 * size.layers, "intermediate_size": 2 * size.hidden_size},
    "mamba2": lambda size: {"num_hidden_layers": 2 * size.layers, "num_heads": 2 * size.heads, "n_groups": 1},
}
"""Settings of a model type that differ from the preset's shape."""


def check_preset(name: str) -> Preset:
    """The preset of a name; raises :class:`LabError` for an unknown one."""
    if name not in PRESETS:
        raise LabError(f"unknown preset {name!r}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def resolve_model(model: ModelConfig) -> ModelConfig:
    """Check the model settings; fill in preset, absolute paths and a digest of the files.

    Raises:
        LabError: preset, type or file is unknown, two of them contradict each other, or a file has changed since its
        digest was stored.
    """
    if model.preset is not None:
        check_preset(model.preset)
    if model.weights is not None:
        if model.preset is not None or model.architecture is not None:
            raise LabError(f"weights {model.weights!r} bring their own architecture, leave --model and --preset out")
        folder = named_path(model.weights, f"weights {model.weights!r}")
        if not (folder / "config.json").is_file():
            raise LabError(f"weights {model.weights!r}: expected a Hugging Face folder with config.json")
        files = [folder / "config.json", *sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.bin"))]
        model = model.model_copy(update={"weights": str(folder)})
    elif model.architecture is not None and not is_model_type(model.architecture):
        if model.preset is not None:
            raise LabError(f"model {model.architecture!r} has its own size, leave --preset {model.preset} out")
        path = configuration_file(model.architecture)
        files = [path]
        model = model.model_copy(update={"architecture": str(path)})
    else:
        files = []
        model = model.model_copy(update={"preset": model.preset or DEFAULT_PRESET})
    digest = files_digest(files)
    if model.digest is not None and model.digest != digest:
        raise LabError(f"model {model.weights or model.architecture!r} has changed since this run began")
    if files or model.overrides or model.architecture:
        causal_configuration(model)  # for its errors, before anything else is done
    return model.model_copy(update={"digest": digest})


def name_of(model: Mapping[str, Any]) -> str:
    """The name of a stored model for a heading: its preset, its type, or its file or folder."""
    place = model.get("weights") or model.get("architecture") or ""
    if Path(place).is_absolute():
        place = Path(place.removesuffix("config.json")).name
    return " ".join(part for part in (place, model.get("preset")) if part)


def causal_configuration(model: ModelConfig, *, vocabulary_size: int = 2048, sequence_length: int = 128) -> Any:
    """The transformers configuration of a causal language model.

    A preset or model type gets this vocabulary and sequence length; values from a file or ``overrides`` are kept.

    Raises:
        LabError: there is no such model type, file or key, or the type is no causal language model.
    """
    sized_by_preset = False
    if model.weights is not None:
        stated = read_configuration_file(Path(model.weights) / "config.json")
    elif model.architecture is not None and not is_model_type(model.architecture):
        stated = read_configuration_file(configuration_file(model.architecture))
    else:
        stated = {"model_type": model.architecture or DEFAULT_TYPE}
        sized_by_preset = True
    model_type = str(stated["model_type"])
    transformers = quiet_transformers()
    place = f"model {model.weights or model.architecture or DEFAULT_TYPE!r}"
    if model_type not in transformers.CONFIG_MAPPING:
        raise LabError(f"{place}: unknown model_type {model_type!r}{close_to(model_type)}")
    cls = transformers.CONFIG_MAPPING[model_type]
    if cls not in transformers.AutoModelForCausalLM._model_mapping:
        raise LabError(f"{place}: model type {model_type!r} is no causal language model of transformers")
    plain = cls()
    for key in model.overrides:
        if not hasattr(plain, key):
            raise LabError(f"{place}: {model_type} has no setting {key!r}{close_to(key, list(plain.to_dict()))}")
    if sized_by_preset:
        settings = {**shape_of(model_type, check_preset(model.preset or DEFAULT_PRESET)), **positions(sequence_length)}
        settings = {key: value for key, value in settings.items() if hasattr(plain, key) and is_settable(cls, key)}
    else:
        settings = stated
    names = cls.attribute_map
    if "vocab_size" not in settings and names.get("vocab_size") not in settings:
        settings["vocab_size"] = vocabulary_size
    # Use the type's own names, so that overrides also replace settings under aliases.
    settings = {names.get(key, key): value for source in (settings, model.overrides) for key, value in source.items()}
    settings.pop("model_type", None)
    refuse_kernels(settings, place)
    try:
        # A decoder that may look ahead (BERT's kind) would learn to copy.
        decoder = {"is_decoder": True} if hasattr(plain, "is_decoder") else {}
        return cls.from_dict(settings | decoder | {"use_cache": False})
    except Exception as error:
        # A configuration's checks may fail in any way.
        raise LabError(f"{place} is not a configuration of {model_type}: {' '.join(str(error).split())}") from None


def refuse_kernels(settings: Any, place: str) -> None:
    """Raise :class:`LabError` if a configuration names code of the Hugging Face hub for its attention or experts."""
    for key, value in settings.items() if isinstance(settings, dict) else ():
        if str(key).endswith(("attn_implementation", "experts_implementation")):
            for name in value.values() if isinstance(value, dict) else [value]:
                if "/" in str(name):
                    raise LabError(f"{place}: {key}={name!r} is code from the hub, which is not run")
        refuse_kernels(value, place)


def shape_of(model_type: str, size: Preset) -> dict[str, Any]:
    """A preset in the names of transformers."""
    shape = {
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "head_dim": size.hidden_size // size.heads,
    }
    reshape = RESHAPED.get(model_type)
    return shape | reshape(size) if reshape else shape


def positions(sequence_length: int) -> dict[str, Any]:
    return {"max_position_embeddings": sequence_length, "n_positions": sequence_length}


def is_settable(cls: type, key: str) -> bool:
    """True if a setting is stored, and not a property computed from others."""
    found = getattr(cls, key, None)
    return not isinstance(found, property) or found.fset is not None


def is_model_type(name: str) -> bool:
    """True if a word is a model type; ``./gpt2`` is always a path."""
    # Recognize most paths and the default without the slow import of transformers.
    if name == DEFAULT_TYPE or Path(name).name != name or Path(name).suffix:
        return name == DEFAULT_TYPE
    return name in quiet_transformers().CONFIG_MAPPING


def configuration_file(name: str) -> Path:
    """The file that holds a configuration: the path itself, or ``config.json`` in it.

    Raises:
        LabError: there is none.
    """
    if name in PRESETS:
        raise LabError(f"model {name!r} is a size, give it as --preset {name}")
    path = named_path(name, f"model {name!r}")
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise LabError(
            f"unknown model {name!r}, expected a model type of transformers, or a config.json, a TOML file or a folder "
            f"with config.json{close_to(name)}"
        )
    return file


def read_configuration_file(path: Path) -> dict[str, Any]:
    """The settings in a JSON or TOML file.

    Raises:
        LabError: the file is missing, has another format, or names no model type.
    """
    values = read_toml(path) if path.suffix == ".toml" else parse_json(path.read_bytes(), f"model {str(path)!r}")
    if not isinstance(values, dict) or "model_type" not in values:
        raise LabError(f'model {str(path)!r} names no model_type, such as "llama"')
    return values


def close_to(name: str, known: list[str] | None = None) -> str:
    """A hint at similar names, for the end of a message."""
    names = known or [*PRESETS, *quiet_transformers().CONFIG_MAPPING]
    close = difflib.get_close_matches(name, names, n=3)
    return f"; close to it: {', '.join(close)}" if close else ""


def files_digest(files: list[Path]) -> str | None:
    if not files:
        return None
    stats = [(str(file), (stat := file.stat()).st_mtime_ns, stat.st_size) for file in files]
    return hashlib.sha256("".join(file_digest(*stat) for stat in stats).encode()).hexdigest()[:32]


@cache
def file_digest(path: str, _mtime_ns: int, _size: int) -> str:
    """SHA-256 of a file, cached, since a comparison needs it for every run."""
    with open(path, "rb") as file:  # noqa: PTH123
        return hashlib.file_digest(file, "sha256").hexdigest()
