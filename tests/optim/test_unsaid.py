"""Muon and Spectra tell, once, what looks like embeddings and heads where nobody said what parameters are."""

import warnings

import pytest
import torch
from torch import nn

import spectrim


class Model(nn.Module):
    def __init__(self, vocabulary: int = 400, width: int = 16) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width)}) for _ in range(3)
        )
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)


def said(make) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    return [str(warning.message) for warning in caught]


RECIPES = [spectrim.Muon, spectrim.Spectra]


@pytest.mark.parametrize("recipe", RECIPES)
def test_embeddings_and_heads_are_told_by_name_once_for_all_groups(recipe):
    decays = [pair for pair in Model().named_parameters() if pair[1].ndim > 1]
    others = [pair for pair in Model().named_parameters() if pair[1].ndim < 2]
    (message,) = said(lambda: recipe([{"params": decays}, {"params": others, "weight_decay": 0.0}]))
    assert "look like embeddings or heads as hidden matrices: 'tok_embeddings.weight', 'lm_head.weight'." in message
    assert "spectrim.param_groups(model)" in message
    assert '"role": "embedding"' in message


@pytest.mark.parametrize("recipe", RECIPES)
def test_embeddings_and_heads_are_told_by_shape_where_there_are_no_names(recipe):
    (message,) = said(lambda: recipe(Model().parameters()))
    assert "one of shape (400, 16), one of shape (400, 16)." in message


def test_a_whole_model_without_names_or_telling_shapes_is_told_so():
    (message,) = said(lambda: spectrim.Muon(Model(vocabulary=64).parameters()))
    assert "treats all 8 matrices as hidden" in message


def silent():
    model = Model()
    hidden = model.layers.named_parameters()
    factors = [nn.Parameter(torch.zeros(shape)) for _ in range(4) for shape in ((4, 64), (64, 4))]
    yield "groups of param_groups", lambda: spectrim.Muon(spectrim.param_groups(model))
    yield "hidden matrices by name", lambda: spectrim.Muon([(n, p) for n, p in hidden if p.ndim == 2])
    yield "hidden matrices", lambda: spectrim.Muon([p for p in model.layers.parameters() if p.ndim == 2])
    yield "said to be matrices", lambda: spectrim.Muon([{"params": list(model.named_parameters()), "role": "matrix"}])
    yield "factors of LoRA", lambda: spectrim.Muon(factors)
    yield "AdamW, which treats all alike", lambda: spectrim.AdamW(model.named_parameters(), clip="auto")
    yield "a frozen embedding", lambda: spectrim.Muon(frozen(model).named_parameters())


def frozen(model):
    model.tok_embeddings.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    return model


@pytest.mark.parametrize(("case", "make"), list(silent()), ids=lambda value: value if isinstance(value, str) else "")
def test_nothing_is_said_where_nothing_is_wrong(case, make):
    assert said(make) == []


@pytest.mark.parametrize(
    ("name", "looks"),
    [
        ("transformer.wte.weight", True),
        ("model.embed_tokens.weight", True),
        ("module.lm_head.weight", True),
        ("head.weight", True),
        ("model.embed_out.weight", True),
        ("score.weight", True),
        ("layers.0.attention.output.weight", False),
        ("layers.3.mlp.head.weight", False),
        ("encoder.headless.weight", False),
        ("layers.0.mlp.up_proj.weight", False),
    ],
)
def test_names_that_look_like_embeddings_or_heads(name, looks):
    messages = said(lambda: spectrim.Muon([(name, nn.Parameter(torch.zeros(8, 8)))]))
    assert bool(messages) == looks


def test_an_optimizer_made_by_the_trainer_of_transformers_says_so(tmp_path):
    import transformers

    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 512, "n_positions": 16}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = transformers.Trainer(model, arguments, optimizer_cls_and_kwargs=(spectrim.Muon, {"lr": 1e-2}))
    assert any("Muon treats" in message for message in said(trainer.create_optimizer))
    # And as it says: the groups are an argument like any other.
    kwargs = {"lr": 1e-2, "params": spectrim.param_groups(model)}
    trainer = transformers.Trainer(model, arguments, optimizer_cls_and_kwargs=(spectrim.Muon, kwargs))
    assert not any("Muon treats" in message for message in said(trainer.create_optimizer))
    assert "embedding" in {row.role for row in spectrim.describe(trainer.optimizer).rows}
