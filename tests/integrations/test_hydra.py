"""Optimizers from Hydra's configs and YAML: what they hand over leaves nothing of its own in an optimizer."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import spectrim

hydra = pytest.importorskip("hydra")
omegaconf = pytest.importorskip("omegaconf")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16))


def values(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        for key, item in tree.items():
            yield key
            yield from values(item)
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from values(item)
    else:
        yield tree


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Weights after two steps, the second of them by an optimizer that went through a checkpoint."""
    for seed in range(2):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        state = optimizer.state_dict()
        kinds = {type(value) for value in values(state)}
        assert kinds <= {int, float, bool, str, torch.Tensor, type(None)}, kinds
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        optimizer.load_state_dict(torch.load(buffer, weights_only=True))
    return [parameter.detach() for parameter in model.parameters()]


CONFIG = """
_target_: spectrim.create
name: adamw+clip
lr: 2e-3
betas: [0.9, 0.95]
clip_decay: linear
total_steps: 100
peak_lr: ${lr}
overrides:
  "2.weight": {lr_factor: 0.5, betas: [0.8, 0.9]}
split:
  "1.weight": [interleaved, 2, 2]
"""


def test_a_config_says_what_keywords_say() -> None:
    model, plain = network(), network()
    optimizer = hydra.utils.instantiate(omegaconf.OmegaConf.create(CONFIG), model_or_params=model)
    expected = spectrim.create(
        "adamw+clip",
        plain,
        lr=2e-3,
        betas=(0.9, 0.95),
        clip_decay="linear",
        total_steps=100,
        peak_lr=2e-3,
        overrides={"2.weight": {"lr_factor": 0.5, "betas": (0.8, 0.9)}},
        split={"1.weight": ("interleaved", 2, 2)},
    )
    for got, wanted in zip(stepped(model, optimizer), stepped(plain, expected), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("given", ["groups", "groups by keyword", "parameters", "names", "names by keyword", "partial"])
def test_a_class_as_target_takes_all_that_it_takes_in_a_call(given: str) -> None:
    model, plain = network(), network()
    config = omegaconf.OmegaConf.create(
        {"_target_": "spectrim.AdamW", "lr": 1e-3, "betas": [0.9, 0.95], "clip": "auto"}
    )
    instantiate = hydra.utils.instantiate
    named = "names" in given
    source = {"parameters": lambda m: m.parameters()}.get(given, lambda m: list(m.named_parameters()))
    params = source(model) if named or given == "parameters" else spectrim.param_groups(model)
    if given == "partial":
        optimizer = instantiate(config, _partial_=True)(params)
    elif "keyword" in given:
        # Hydra wraps lists that are keywords.
        optimizer = instantiate(config, params=params)
    else:
        optimizer = instantiate(config, params)
    plain_params = source(plain) if named or given == "parameters" else spectrim.param_groups(plain)
    expected = spectrim.AdamW(plain_params, lr=1e-3, betas=(0.9, 0.95), clip="auto")
    for got, wanted in zip(stepped(model, optimizer), stepped(plain, expected), strict=True):
        assert torch.equal(got, wanted)
    assert [group.get("param_names") for group in optimizer.param_groups] == [
        group.get("param_names") for group in expected.param_groups
    ]


def test_keys_of_groups_that_are_no_options_are_kept_as_plain_values() -> None:
    tags = omegaconf.OmegaConf.create({"tags": ["a", "b"], "nested": {"x": [1]}})
    optimizer = spectrim.AdamW([{"params": list(network().parameters()), **tags}], lr=1e-3)
    group = optimizer.param_groups[0]
    assert (type(group["tags"]), group["tags"]) == (list, ["a", "b"])
    assert (type(group["nested"]), group["nested"]) == (dict, {"x": [1]})


def test_a_config_resolves_numbers_that_yaml_takes_for_text() -> None:
    yaml = pytest.importorskip("yaml")
    text = "{name: adamw, lr: 2e-3}"
    with pytest.raises(ValueError, match="this is text, not a number"):
        spectrim.create(model_or_params=network(), **yaml.safe_load(text))
    optimizer = spectrim.create(model_or_params=network(), **omegaconf.OmegaConf.create(text))
    assert optimizer.param_groups[0]["lr"] == 2e-3
