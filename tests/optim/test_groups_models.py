"""What every parameter of known models is, against tables written by hand from the models' modules.

Models are built from configurations, with one layer of width 32. A table lists every parameter of two dimensions or
more; the rest must be vectors. That logical matrices are the ones the model multiplies by is checked by computing.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from spectrim.optim.grouping.groups import param_groups
from spectrim.optim.grouping.layout import matrices, put_back

MATRIX = ("matrix", "matrix", None)
TRANSPOSED = ("matrix", "transposed", None)
EMBEDDING = ("embedding", "matrix", None)
HEAD = ("head", "matrix", None)
VECTOR = ("vector", "vector", None)

SMALL = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 48,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GROUPED_QUERIES = {**SMALL, "num_key_value_heads": 2}
GPT2 = {
    "n_layer": 1,
    "n_embd": 32,
    "n_head": 4,
    "vocab_size": 48,
    "n_positions": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def build(name: str, task: str = "ForCausalLM", **settings: object) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**settings)
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, f"{name}{task}")(config)
    return model


def table(model: nn.Module) -> dict[str, tuple[object, ...]]:
    rows = [
        (name, (group["role"], group["layout"], group["split"]))
        for group in param_groups(model)
        for name, _ in group["params"]
    ]
    assert sorted(name for name, _ in rows) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    return dict(rows)


def check(model: nn.Module, expected: dict[str, tuple[object, ...]]) -> None:
    found = table(model)
    one_axis = {name for name, parameter in model.named_parameters() if parameter.ndim < 2}
    assert {name: row for name, row in found.items() if name not in one_axis} == expected
    assert all(row == VECTOR for name, row in found.items() if name in one_axis)


def under(prefix: str, *names: str, reading: tuple[object, ...] = MATRIX) -> dict[str, tuple[object, ...]]:
    return {f"{prefix}.{name}.weight": reading for name in names}


LLAMA_LAYER = {
    **under("model.layers.0.self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
    **under("model.layers.0.mlp", "gate_proj", "up_proj", "down_proj"),
}
ATTENTION = under("model.layers.0.self_attn", "q_proj", "k_proj", "v_proj", "o_proj")
EMBED = {"model.embed_tokens.weight": EMBEDDING}
LM_HEAD = {"lm_head.weight": HEAD}


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_decoder_with_tied_and_untied_head(name: str, tied: bool) -> None:
    model = build(name, **GROUPED_QUERIES, tie_word_embeddings=tied)
    check(model, {**EMBED, **LLAMA_LAYER, **({} if tied else LM_HEAD)})


@pytest.mark.parametrize("tied", [False, True])
def test_gpt2(tied: bool) -> None:
    expected = {
        "transformer.wte.weight": EMBEDDING,
        "transformer.wpe.weight": EMBEDDING,
        "transformer.h.0.attn.c_attn.weight": ("matrix", "transposed", (32, 32, 32)),
        **under("transformer.h.0", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", reading=TRANSPOSED),
    }
    check(build("GPT2", "LMHeadModel", **GPT2, tie_word_embeddings=tied), {**expected, **({} if tied else LM_HEAD)})


def test_gpt2_cross_attention_stores_keys_and_values_only() -> None:
    found = table(build("GPT2", "LMHeadModel", **GPT2, add_cross_attention=True))
    assert found["transformer.h.0.crossattention.c_attn.weight"] == ("matrix", "transposed", (32, 32))
    assert found["transformer.h.0.crossattention.q_attn.weight"] == TRANSPOSED


def test_mixtral() -> None:
    expected = {
        **EMBED,
        **ATTENTION,
        **LM_HEAD,
        "model.layers.0.mlp.gate.weight": MATRIX,
        "model.layers.0.mlp.experts.gate_up_proj": ("matrix", "stack", (64, 64)),
        "model.layers.0.mlp.experts.down_proj": ("matrix", "stack", None),
    }
    check(build("Mixtral", **GROUPED_QUERIES, num_local_experts=3), expected)


def test_qwen2_moe_with_shared_expert() -> None:
    expected = {
        **EMBED,
        **ATTENTION,
        **LM_HEAD,
        "model.layers.0.mlp.gate.weight": MATRIX,
        **under("model.layers.0.mlp.shared_expert", "gate_proj", "up_proj", "down_proj"),
        "model.layers.0.mlp.shared_expert_gate.weight": MATRIX,
        "model.layers.0.mlp.experts.gate_up_proj": ("matrix", "stack", (16, 16)),
        "model.layers.0.mlp.experts.down_proj": ("matrix", "stack", None),
    }
    settings = {"num_experts": 3, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
    check(build("Qwen2Moe", **GROUPED_QUERIES, **settings), expected)


def test_qwen3_moe() -> None:
    expected = {
        **EMBED,
        **ATTENTION,
        **LM_HEAD,
        "model.layers.0.mlp.gate.weight": MATRIX,
        "model.layers.0.mlp.experts.gate_up_proj": ("matrix", "stack", (16, 16)),
        "model.layers.0.mlp.experts.down_proj": ("matrix", "stack", None),
    }
    check(build("Qwen3Moe", **GROUPED_QUERIES, num_experts=3, moe_intermediate_size=16), expected)


BERT_BODY = {
    **under("bert.embeddings", "word_embeddings", "position_embeddings", "token_type_embeddings", reading=EMBEDDING),
    **under("bert.encoder.layer.0.attention", "self.query", "self.key", "self.value", "output.dense"),
    **under("bert.encoder.layer.0", "intermediate.dense", "output.dense"),
}


@pytest.mark.parametrize("tied", [False, True])
def test_bert_masked_language_model(tied: bool) -> None:
    expected = {**BERT_BODY, "cls.predictions.transform.dense.weight": MATRIX}
    if not tied:
        expected["cls.predictions.decoder.weight"] = HEAD
    check(build("Bert", "ForMaskedLM", **SMALL, tie_word_embeddings=tied), expected)


def test_bert_classifier_is_a_head_and_its_pooler_a_matrix() -> None:
    expected = {**BERT_BODY, "bert.pooler.dense.weight": MATRIX, "classifier.weight": HEAD}
    check(build("Bert", "ForSequenceClassification", **SMALL), expected)


def test_two_layer_classifier_has_one_head() -> None:
    found = table(build("Roberta", "ForSequenceClassification", **SMALL))
    assert found["classifier.dense.weight"] == MATRIX
    assert found["classifier.out_proj.weight"] == HEAD


def test_sequence_classifier_of_a_decoder() -> None:
    assert table(build("Llama", "ForSequenceClassification", **SMALL))["score.weight"] == HEAD


def test_vit() -> None:
    expected = {
        "vit.embeddings.cls_token": ("embedding", "stack", None),
        "vit.embeddings.position_embeddings": ("embedding", "stack", None),
        "vit.embeddings.patch_embeddings.projection.weight": ("matrix", "flatten", None),
        "classifier.weight": HEAD,
    }
    settings = {
        key: SMALL[key] for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    }
    found = table(build("ViT", "ForImageClassification", **settings, image_size=8, patch_size=4))
    layers = {
        name: row for name, row in found.items() if ".layer" in name and name.endswith("weight") and "norm" not in name
    }
    assert len(layers) == 6
    assert set(layers.values()) == {MATRIX}
    assert {name: row for name, row in found.items() if name not in layers and row != VECTOR} == expected


@pytest.mark.parametrize("tied", [False, True])
def test_t5(tied: bool) -> None:
    attention, gated = ("q", "k", "v", "o"), ("wi_0", "wi_1", "wo")
    expected = {
        "shared.weight": EMBEDDING,
        **under("encoder.block.0.layer.0.SelfAttention", *attention),
        **under("encoder.block.0.layer.0.SelfAttention", "relative_attention_bias", reading=EMBEDDING),
        **under("encoder.block.0.layer.1.DenseReluDense", *gated),
        **under("decoder.block.0.layer.0.SelfAttention", *attention),
        **under("decoder.block.0.layer.0.SelfAttention", "relative_attention_bias", reading=EMBEDDING),
        **under("decoder.block.0.layer.1.EncDecAttention", *attention),
        **under("decoder.block.0.layer.2.DenseReluDense", *gated),
    }
    shape = {"vocab_size": 48, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    model = build("T5", "ForConditionalGeneration", **shape, feed_forward_proj="gated-gelu")
    if not tied:
        # T5's own configuration ties whatever it is told.
        model.lm_head.weight = nn.Parameter(torch.empty(48, 32, device="meta"))
    check(model, {**expected, **({} if tied else LM_HEAD)})


def test_phi3_fuses_queries_with_fewer_keys_and_values() -> None:
    found = table(build("Phi3", **GROUPED_QUERIES))
    assert found["model.layers.0.self_attn.qkv_proj.weight"] == ("matrix", "matrix", (32, 16, 16))
    assert found["model.layers.0.mlp.gate_up_proj.weight"] == ("matrix", "matrix", (64, 64))


def test_mamba() -> None:
    mixer = "backbone.layers.0.mixer"
    expected = {
        "backbone.embeddings.weight": EMBEDDING,
        f"{mixer}.A_log": VECTOR,
        f"{mixer}.conv1d.weight": VECTOR,
        f"{mixer}.in_proj.weight": ("matrix", "matrix", (64, 64)),
        f"{mixer}.x_proj.weight": ("matrix", "matrix", (2, 4, 4)),
        f"{mixer}.dt_proj.weight": MATRIX,
        f"{mixer}.out_proj.weight": MATRIX,
    }
    shape = {"vocab_size": 48, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 1, "time_step_rank": 2}
    check(build("Mamba", **shape), expected)


def test_mamba2() -> None:
    shape = {"hidden_size": 32, "state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 2, "expand": 2}
    found = table(build("Mamba2", vocab_size=48, num_hidden_layers=1, **shape))
    assert found["backbone.layers.0.mixer.in_proj.weight"] == ("matrix", "matrix", (64, 64, 8, 8, 8))


def test_deepseek_v3_latent_attention() -> None:
    ranks = {"q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
    experts = {
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 0,
        "n_group": 1,
        "topk_group": 1,
    }
    found = table(build("DeepseekV3", **SMALL, num_key_value_heads=4, **ranks, **experts))
    assert found["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"] == ("matrix", "matrix", (8, 4))
    assert found["model.layers.0.self_attn.kv_b_proj.weight"] == ("matrix", "matrix", ("interleaved", 8, 6))
    assert found["model.layers.0.mlp.experts.gate_up_proj"] == ("matrix", "stack", (16, 16))


NEOX, FALCON = "gpt_neox.layers.0.attention", "transformer.h.0.self_attention"
BLOOM = {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 48}

# Layer around the fused projection, and its values' share: zeroed, attention must return nothing.
FUSED_ATTENTION = [
    ("GPT2", "LMHeadModel", GPT2, "transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"),
    ("Phi3", "ForCausalLM", GROUPED_QUERIES, "model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.o_proj"),
    (
        "Falcon",
        "ForCausalLM",
        {**SMALL, "multi_query": True, "new_decoder_architecture": False},
        "transformer.h.0.self_attention.query_key_value",
        "transformer.h.0.self_attention.dense",
    ),
    (
        "GPTBigCode",
        "ForCausalLM",
        {**GPT2, "multi_query": True},
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.attn.c_proj",
    ),
    (
        "Mpt",
        "ForCausalLM",
        {"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 48},
        "transformer.blocks.0.attn.Wqkv",
        "transformer.blocks.0.attn.out_proj",
    ),
    (
        "ModernBert",
        "ForMaskedLM",
        {**SMALL, "cls_token_id": 0, "sep_token_id": 0},
        "model.layers.0.attn.Wqkv",
        "model.layers.0.attn.Wo",
    ),
    # Head by head, or group by group.
    ("GPTNeoX", "ForCausalLM", SMALL, f"{NEOX}.query_key_value", f"{NEOX}.dense"),
    ("Bloom", "ForCausalLM", BLOOM, f"{FALCON}.query_key_value", f"{FALCON}.dense"),
    ("Falcon", "ForCausalLM", {**SMALL, "multi_query": False}, f"{FALCON}.query_key_value", f"{FALCON}.dense"),
    (
        "Falcon",
        "ForCausalLM",
        {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2},
        f"{FALCON}.query_key_value",
        f"{FALCON}.dense",
    ),
    (
        "Persimmon",
        "ForCausalLM",
        {**SMALL, "qk_layernorm": False},
        "model.layers.0.self_attn.query_key_value",
        "model.layers.0.self_attn.dense",
    ),
    (
        "GPTBigCode",
        "ForCausalLM",
        {**GPT2, "multi_query": False},
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.attn.c_proj",
    ),
]


def output_of_attention(model: nn.Module, projection: str) -> torch.Tensor:
    inputs: list[torch.Tensor] = []
    handle = model.get_submodule(projection).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.arange(1, 9)[None])
    handle.remove()
    return inputs[0]


def multiply_parts(model: nn.Module, layer: str, *factors: float) -> None:
    """Multiply the logical matrices of a fused layer, whose bias is zero from here on."""
    name = f"{layer}.weight"
    _, layout, split = table(model)[name]
    weight = model.get_parameter(name).detach()
    parts = matrices(weight, layout, split)  # type: ignore[arg-type]
    for part, factor in zip(parts, factors, strict=True):
        part.mul_(factor)
    put_back(parts, weight, layout, split)  # type: ignore[arg-type]
    bias = getattr(model.get_submodule(layer), "bias", None)
    if bias is not None:
        nn.init.zeros_(bias)


@pytest.mark.parametrize(
    ("name", "task", "settings", "layer", "projection"), FUSED_ATTENTION, ids=lambda v: str(v)[:12]
)
def test_the_last_part_of_a_fused_attention_is_its_values(
    name: str, task: str, settings: dict[str, object], layer: str, projection: str
) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}{task}")(getattr(transformers, f"{name}Config")(**settings)).eval()
    multiply_parts(model, layer, 30.0, 30.0, 1.0)
    expected = output_of_attention(model, projection)
    assert expected.abs().max() > 0
    # What queries gain and keys lose leaves every score as it was.
    multiply_parts(model, layer, 2.0, 0.5, 1.0)
    torch.testing.assert_close(output_of_attention(model, projection), expected)
    multiply_parts(model, layer, 2.0, 1.0, 1.0)
    assert not torch.allclose(output_of_attention(model, projection), expected, rtol=1e-3)
    multiply_parts(model, layer, 1.0, 1.0, 0.0)
    assert output_of_attention(model, projection).abs().max() == 0


MOE = {"num_local_experts": 3, "num_experts": 3, "moe_intermediate_size": 16, "moe_num_experts": 3}


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe", "Qwen3Moe"])
def test_experts_multiply_by_their_logical_matrices(name: str) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**GROUPED_QUERIES, **MOE)
    )
    path = "model.layers.0.mlp.experts"
    found = table(model)
    experts = model.get_submodule(path)
    X, expert = torch.randn(5, 32), 1
    gate, up = matrices(experts.gate_up_proj.detach(), *found[f"{path}.gate_up_proj"][1:])
    (down,) = matrices(experts.down_proj.detach(), *found[f"{path}.down_proj"][1:])
    expected = (functional.silu(X @ gate[expert].T) * (X @ up[expert].T)) @ down[expert].T
    got = experts(X, torch.full((5, 1), expert), torch.ones(5, 1))
    torch.testing.assert_close(got.detach(), expected)


def test_llama4_experts_are_stored_transposed() -> None:
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(**GROUPED_QUERIES, num_local_experts=3, intermediate_size_mlp=64)
    model = transformers.Llama4ForCausalLM(config)
    path = "model.layers.0.feed_forward.experts"
    found = table(model)
    experts = model.get_submodule(path)
    with torch.no_grad():
        experts.gate_up_proj.normal_()
        experts.down_proj.normal_()
    X = torch.randn(3, 5, 32)
    gate, up = matrices(experts.gate_up_proj.detach(), *found[f"{path}.gate_up_proj"][1:])
    (down,) = matrices(experts.down_proj.detach(), *found[f"{path}.down_proj"][1:])
    expected = (functional.silu(X @ gate.mT) * (X @ up.mT)) @ down.mT
    torch.testing.assert_close(experts(X.reshape(-1, 32)).detach(), expected.reshape(-1, 32))


def test_gpt_oss_alternates_between_gate_and_up() -> None:
    found = table(build("GptOss", **GROUPED_QUERIES, num_local_experts=3))
    assert found["model.layers.0.mlp.experts.gate_up_proj"] == ("matrix", "transposed_stack", ("interleaved", 1, 1))
    assert found["model.layers.0.mlp.experts.gate_up_proj_bias"] == VECTOR
    assert found["model.layers.0.mlp.router.weight"] == MATRIX


def test_lora_on_fused_attention_embedding_and_head() -> None:
    import peft

    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    targets = ["c_attn", "wte", "lm_head"]
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=True))
    prefix = "base_model.model"
    expected = {
        f"{prefix}.transformer.wte.lora_embedding_A.default": ("embedding", "transposed", None),
        f"{prefix}.transformer.wte.lora_embedding_B.default": MATRIX,
        f"{prefix}.transformer.h.0.attn.c_attn.lora_A.default.weight": MATRIX,
        f"{prefix}.transformer.h.0.attn.c_attn.lora_B.default.weight": ("matrix", "matrix", (32, 32, 32)),
        f"{prefix}.lm_head.lora_A.default.weight": MATRIX,
        f"{prefix}.lm_head.lora_B.default.weight": HEAD,
    }
    assert table(model) == expected


def test_lora_with_embedding_and_head_trained_in_full() -> None:
    import peft

    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED_QUERIES))
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], use_dora=True)
    prefix = "base_model.model"
    attention = f"{prefix}.model.layers.0.self_attn.q_proj"
    expected = {
        f"{prefix}.model.embed_tokens.modules_to_save.default.weight": EMBEDDING,
        f"{prefix}.lm_head.modules_to_save.default.weight": HEAD,
        f"{attention}.lora_A.default.weight": MATRIX,
        f"{attention}.lora_B.default.weight": MATRIX,
        f"{attention}.lora_magnitude_vector.default.weight": VECTOR,
    }
    assert table(peft.get_peft_model(base, config)) == expected


def test_a_classifier_that_peft_trains_in_full_is_a_head() -> None:
    import peft

    base = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**GROUPED_QUERIES))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS"))
    assert table(model)["base_model.model.score.modules_to_save.default.weight"] == HEAD


def test_a_fused_layer_that_peft_trains_in_full_is_split() -> None:
    import peft

    base = transformers.Phi3ForCausalLM(transformers.Phi3Config(**GROUPED_QUERIES))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["o_proj"], modules_to_save=["qkv_proj"]))
    name = "base_model.model.model.layers.0.self_attn.qkv_proj.modules_to_save.default.weight"
    assert table(model)[name] == ("matrix", "matrix", (32, 16, 16))


def real_llama() -> nn.Module:
    """A small model that is not on the meta device, where some adapters cannot be begun."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=False)
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


@pytest.mark.parametrize("indices", [[5], [5, 6], {"embed_tokens": [5, 6], "lm_head": [5, 6]}])
@pytest.mark.parametrize("with_lora", [True, False])
def test_rows_of_new_tokens_are_what_their_table_is(indices: Any, with_lora: bool) -> None:
    import peft

    if with_lora:
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=indices)
    else:
        names = list(indices) if isinstance(indices, dict) else ["embed_tokens"]
        config = peft.TrainableTokensConfig(token_indices=[5, 6], target_modules=names)
    found = table(peft.get_peft_model(real_llama(), config))
    tokens = {name: reading for name, reading in found.items() if "trainable_tokens_delta" in name}
    assert len(tokens) == (2 if isinstance(indices, dict) else 1)
    for name, reading in tokens.items():
        assert reading[:2] == ("head" if "lm_head" in name else "embedding", "matrix"), name


ADAPTERS: list[tuple[str, dict[str, Any], dict[str, tuple[str, str]]]] = [
    ("LoHaConfig", {"r": 2}, dict.fromkeys(("hada_w1_a", "hada_w2_b"), ("matrix", "matrix"))),
    ("LoKrConfig", {"r": 2}, dict.fromkeys(("lokr_w1", "lokr_w2"), ("matrix", "matrix"))),
    ("OFTConfig", {"oft_block_size": 4}, {"oft_R": ("vector", "vector")}),
    ("BOFTConfig", {"boft_block_size": 4}, dict.fromkeys(("boft_R", "boft_s"), ("vector", "vector"))),
    ("HRAConfig", {"r": 2}, {"hra_u": ("matrix", "matrix")}),
    ("MissConfig", {"r": 2}, {"miss_block": ("matrix", "transposed")}),
    ("C3AConfig", {"block_size": 4}, {"c3a_kernel": ("vector", "vector")}),
    ("RandLoraConfig", {"r": 2}, dict.fromkeys(("randlora_lambda", "randlora_gamma"), ("vector", "vector"))),
    ("DeloraConfig", {"r": 2}, dict.fromkeys(("delora_A", "delora_B"), ("matrix", "matrix"))),
    (
        "GraloraConfig",
        {"r": 4, "gralora_k": 2},
        dict.fromkeys(("gralora_A", "gralora_B"), ("matrix", "transposed_stack")),
    ),
    ("PolyConfig", {"r": 2, "n_tasks": 2}, {"poly_lora_A": ("vector", "vector")}),
    ("OSFConfig", {}, {"osf_svd_params": ("matrix", "matrix")}),
    (
        "VBLoRAConfig",
        {"r": 2, "num_vectors": 8, "vector_length": 4, "topk": 2},
        {"vblora_logits_A": ("vector", "vector"), "vblora_vector_bank": ("embedding", "matrix")},
    ),
]


@pytest.mark.parametrize(("name", "options", "expected"), ADAPTERS)
def test_every_adapter_of_peft_is_read(
    name: str, options: dict[str, Any], expected: dict[str, tuple[str, str]]
) -> None:
    import peft

    make = getattr(peft, name, None)
    if make is None:
        pytest.skip(f"this version of peft has no {name}")
    found = table(peft.get_peft_model(real_llama(), make(target_modules=["q_proj"], **options)))
    for factor, reading in expected.items():
        named = {key: value[:2] for key, value in found.items() if f".{factor}." in key}
        # What has one axis (singular values) is a vector, whatever it belongs to.
        named = {key: value for key, value in named.items() if not key.endswith("S_low")}
        assert named
        assert set(named.values()) == {reading}, named


class GroupedExperts(nn.Module):
    """Experts as torchtitan holds and names them."""

    def __init__(self, suffixes: bool) -> None:
        super().__init__()
        for name, axes, shape in (("w1", "EFD", (4, 6, 8)), ("w2", "EDF", (4, 8, 6)), ("w3", "EFD", (4, 6, 8))):
            self.register_parameter(f"{name}_{axes}" if suffixes else name, nn.Parameter(torch.zeros(shape)))


@pytest.mark.parametrize("suffixes", [False, True])
def test_experts_of_torchtitan_are_stacks(suffixes: bool) -> None:
    found = table(GroupedExperts(suffixes))
    assert len(found) == 3
    assert {reading[:2] for reading in found.values()} == {("matrix", "stack")}


EXPERTS_OF_GPT_OSS = ("mlp1_weight", "mlp1_bias", "mlp2_weight", "mlp2_bias")


class GptOssGroupedExperts(nn.Module):
    """GPT-OSS's experts as torchtitan holds and names them."""

    def __init__(self, suffixes: tuple[str, str, str, str]) -> None:
        super().__init__()
        shapes = ((4, 12, 8), (4, 12), (4, 8, 6), (4, 8))
        for name, axes, shape in zip(EXPERTS_OF_GPT_OSS, suffixes, shapes, strict=True):
            self.register_parameter(name + axes, nn.Parameter(torch.zeros(shape)))


@pytest.mark.parametrize("suffixes", [("", "", "", ""), ("_EGD", "_EG", "_EDF", "_ED")])
def test_gpt_oss_experts_of_torchtitan_are_stacks_that_alternate(suffixes: tuple[str, str, str, str]) -> None:
    found = table(GptOssGroupedExperts(suffixes))
    first, bias, second, last = (f"{name}{axes}" for name, axes in zip(EXPERTS_OF_GPT_OSS, suffixes, strict=True))
    assert found[first] == ("matrix", "stack", ("interleaved", 1, 1))
    assert found[second] == ("matrix", "stack", None)
    assert found[bias] == found[last] == VECTOR


class FusedQKVLinear(nn.Module):
    """Grouped queries as torchtitan fuses them: for every key its queries, itself, and its value."""

    def __init__(self) -> None:
        super().__init__()
        self.heads_per_kv, self.head_dim = 3, 4
        self.wqkv = nn.Linear(8, 2 * (3 + 2) * 4, bias=False)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        heads = self.wqkv(x).unflatten(-1, (2, 5, 4))
        return [part.flatten(-3) for part in torch.split(heads, [3, 1, 1], dim=-2)]


def test_the_fused_projection_of_torchtitan_multiplies_by_its_logical_matrices() -> None:
    torch.manual_seed(0)
    layer, x = FusedQKVLinear(), torch.randn(5, 8)
    _, layout, split = table(layer)["wqkv.weight"]
    assert split == ("interleaved", 12, 4, 4)
    parts = matrices(layer.wqkv.weight.detach(), layout, split)  # type: ignore[arg-type]
    for part, got in zip(parts, layer(x), strict=True):
        torch.testing.assert_close(x @ part.T, got.detach())


def test_the_compressed_keys_and_values_of_torchtitan_are_apart_from_their_rotary_key() -> None:
    class Attention(nn.Module):
        pass

    attention = Attention()
    attention.kv_lora_rank, attention.qk_rope_head_dim = 8, 4
    attention.wkv_a = nn.Linear(16, 12, bias=False)
    assert table(nn.ModuleDict({"attention": attention}))["attention.wkv_a.weight"] == ("matrix", "matrix", (8, 4))


def test_keys_and_values_of_latent_attention_are_a_matrix_each() -> None:
    torch.manual_seed(0)
    ranks = {"q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 10, "v_head_dim": 6}
    config = transformers.DeepseekV3Config(**SMALL, num_key_value_heads=4, **ranks, first_k_dense_replace=1)
    model = transformers.DeepseekV3ForCausalLM(config)
    layer, x = model.model.layers[0].self_attn, torch.randn(5, 8)
    _, layout, split = table(model)["model.layers.0.self_attn.kv_b_proj.weight"]
    keys, values = matrices(layer.kv_b_proj.weight.detach(), layout, split)  # type: ignore[arg-type]
    # As the model's forward pass takes them apart.
    heads = layer.kv_b_proj(x).unflatten(-1, (4, 10 + 6)).detach()
    key, value = torch.split(heads, [layer.qk_nope_head_dim, layer.v_head_dim], dim=-1)
    torch.testing.assert_close(x @ keys.T, key.flatten(-2))
    torch.testing.assert_close(x @ values.T, value.flatten(-2))


def test_a_layer_inside_of_an_adapter_is_read_as_without_it() -> None:
    import peft

    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    model.requires_grad_(True)
    found = table(model)
    prefix = "base_model.model.transformer"
    assert found[f"{prefix}.h.0.attn.c_attn.base_layer.weight"] == ("matrix", "transposed", (32, 32, 32))
    assert found[f"{prefix}.wte.weight"] == EMBEDDING


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("name", "task", "settings"),
    [
        ("GPT2", "LMHeadModel", {**GPT2, "tie_word_embeddings": False}),
        ("Phi3", "ForCausalLM", GROUPED_QUERIES),
        ("Mixtral", "ForCausalLM", GROUPED_QUERIES),
    ],
)
def test_sharding_every_module_changes_no_reading(name: str, task: str, settings: dict[str, object]) -> None:
    model = getattr(transformers, f"{name}{task}")(getattr(transformers, f"{name}Config")(**settings))
    expected = table(model)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for module in reversed(list(model.modules())):
        if not isinstance(module, nn.ModuleList):
            fully_shard(module, mesh=mesh)
    assert type(model).__name__.startswith("FSDP")
    assert table(model) == expected


@pytest.mark.usefixtures("one_process")
def test_sharding_an_adapted_model_changes_no_reading() -> None:
    import peft

    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, tie_word_embeddings=False))
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "lm_head"], fan_in_fan_out=True)
    model = peft.get_peft_model(base, config)
    expected = table(model)
    fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
    assert type(model).__name__.startswith("FSDP")
    assert table(model) == expected
