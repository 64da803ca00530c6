"""torchtitan's own trainer with spectrim's container, on gloo ranks, and its models read as matrices."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import spectrim
import worlds

pytest.importorskip("torchtitan")

import titan_workers

SETTINGS = {"name": "adamw+clip", "lr": 1e-2, "options": {"weight_decay": 0.1, "betas": (0.9, 0.95)}, "head_lr": 0.5}
LAYOUT = {"moe": True, "dp": 2, "tp": 2, "ep": 2}


def test_the_trainer_resumes_exactly_under_fsdp_tensor_and_expert_parallelism_and_on_one_rank(tmp_path: Path) -> None:
    found = worlds.run(4, titan_workers.train_and_resume, str(tmp_path), SETTINGS, LAYOUT)[0]
    whole, resumed = found["whole"], found["resumed"]
    assert whole.keys() == resumed.keys()
    assert any(name.endswith("exp_avg_sq") for name in whole)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    assert found["steps"] == {4}
    assert not found["shared"]  # the mesh holds all ranks
    # The head's is the smaller one.
    assert sorted(set(found["metrics"].values())) == pytest.approx([0.5e-2 * 2 / 3, 1e-2 * 2 / 3])
    assert re.search(r"0.attention.qkv_linear.wqkv.weight +\(128, 32\) .*\(64, 32\)", found["described"])
    assert re.search(r"0.moe.routed_experts.inner_experts.w1_EFD +\(4, 24, 32\) .*4 x \(24, 32\)", found["described"])
    alone = worlds.run(1, titan_workers.load, str(tmp_path), SETTINGS, {"moe": True})[0]
    for name, value in whole.items():
        assert torch.equal(value, alone[name]), name


def readings(family: str, flavor: str = "debugmodel", **settings: Any) -> dict[str, tuple[Any, ...]]:
    """Role, layout and split of every parameter of a torchtitan model, whose layers have their numbers left out."""
    spec = pytest.importorskip(f"torchtitan.models.{family}").model_registry(flavor, **settings)
    with torch.device("meta"):
        model = spec.model.build()
    return {
        re.sub(r"\.\d+\.", ".N.", name): (group["role"], group["layout"], group["split"])
        for group in spectrim.param_groups(model)
        for name, _ in group["params"]
    }


MATRIX, STACK, VECTOR = ("matrix", "matrix", None), ("matrix", "stack", None), ("vector", "vector", None)


def test_qwen3_has_queries_keys_and_values_in_turns_and_stacks_of_experts() -> None:
    found = readings("qwen3", "debugmodel_moe")
    assert found["tok_embeddings.weight"] == ("embedding", "matrix", None)
    assert found["lm_head.weight"] == ("head", "matrix", None)
    # Two heads of 128 queries for each of keys and values.
    assert found["layers.N.attention.qkv_linear.wqkv.weight"] == ("matrix", "matrix", ("interleaved", 256, 128, 128))
    for name in ("w1_EFD", "w2_EDF", "w3_EFD"):
        assert found[f"layers.N.moe.routed_experts.inner_experts.{name}"] == STACK
    assert found["layers.N.moe.router.gate.weight"] == MATRIX
    assert found["layers.N.attention.q_norm.weight"] == VECTOR


def test_the_weight_of_qwen3_multiplies_as_the_matrices_that_it_is_read_as() -> None:
    titan_workers.on_cpu()
    from spectrim.optim.grouping.layout import matrices

    torch.manual_seed(0)
    layer = titan_workers.tiny_qwen3(moe=False).layers[0].attention.qkv_linear.build()
    nn_init = torch.nn.init.normal_(layer.wqkv.weight.data)
    (group,) = spectrim.param_groups(torch.nn.ModuleDict({"qkv_linear": layer}))
    x = torch.randn(1, 5, titan_workers.WIDTH)
    parts = matrices(nn_init, group["layout"], group["split"])
    for part, heads in zip(parts, layer(x), strict=True):
        torch.testing.assert_close(x @ part.T, heads.flatten(-2).detach())


def test_deepseek_v3_has_latent_attention_apart() -> None:
    found = readings("deepseek_v3")
    assert found["layers.N.attention.wkv_a.weight"] == ("matrix", "matrix", (512, 64))
    assert found["layers.N.attention.wkv_b.weight"] == ("matrix", "matrix", ("interleaved", 128, 128))
    assert found["layers.N.attention.wq.weight"] == MATRIX
    assert found["layers.N.moe.shared_experts.w1.weight"] == MATRIX
    for name in ("w1_EFD", "w2_EDF", "w3_EFD"):
        assert found[f"layers.N.moe.routed_experts.inner_experts.{name}"] == STACK


def test_gpt_oss_has_gates_and_ups_that_alternate_and_biases_of_experts() -> None:
    found = readings("gpt_oss")
    experts = "layers.N.moe.routed_experts.inner_experts"
    assert found["layers.N.attention.qkv_linear.wqkv.weight"] == ("matrix", "matrix", ("interleaved", 512, 64, 64))
    assert found[f"{experts}.mlp1_weight_EGD"] == ("matrix", "stack", ("interleaved", 1, 1))
    assert found[f"{experts}.mlp2_weight_EDF"] == STACK
    for name in (f"{experts}.mlp1_bias_EG", f"{experts}.mlp2_bias_ED", "layers.N.attention.sinks"):
        assert found[name] == VECTOR


def test_torchtitans_patterns_are_refused() -> None:
    from torchtitan.components.optimizer import ParamGroupConfig

    from spectrim.integrations.torchtitan import SpectralOptimizersContainer

    pattern = ParamGroupConfig(pattern=r"\.bias$", optimizer_name="AdamW")
    config = SpectralOptimizersContainer.Config(param_groups=[pattern])
    with pytest.raises(ValueError, match=r"patterns '\\\\.bias\$': expected none"):
        config.build(model_parts=[torch.nn.Linear(2, 2)])


def test_the_command_line_of_torchtitan_sets_the_recipe() -> None:
    titan_workers.on_cpu()
    tyro = pytest.importorskip("tyro")
    from torchtitan.config.manager import custom_registry

    from spectrim.integrations.torchtitan import SpectralOptimizersContainer

    config = SpectralOptimizersContainer.Config(options={"weight_decay": 0.1})
    arguments = ["--name", "muon", "--lr", "2e-3"]
    found = tyro.cli(SpectralOptimizersContainer.Config, args=arguments, default=config, registry=custom_registry)
    optimizer = found.build(model_parts=[torch.nn.Linear(2, 2)]).optimizers[0]
    assert isinstance(optimizer, spectrim.Muon)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (2e-3, 0.1)
