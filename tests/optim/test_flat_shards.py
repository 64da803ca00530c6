"""Flat shards, in which no matrix can be seen, are refused by name. The frameworks' marks are set by hand, for none of
them need be installed; FSDP1 itself is in torch."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import spectrim
import worlds


def matrix() -> nn.Parameter:
    return nn.Parameter(torch.randn(8, 4))


def marked(mark: str, value: object = True) -> nn.Parameter:
    parameter = nn.Parameter(torch.randn(32))
    setattr(parameter, mark, value)
    return parameter


MAKERS = {
    "AdamW": lambda params: spectrim.AdamW(params, clip="auto"),
    "Muon": spectrim.Muon,
    "SpectralClipping": lambda params: spectrim.SpectralClipping(torch.optim.AdamW(params)),
}
MARKS = [
    ("_is_flat_param", True, "FSDP1"),
    ("_fsdp_flattened", True, "FSDP1"),
    ("ds_id", 0, "ZeRO stage 3"),
    ("ds_tensor", torch.zeros(4), "ZeRO stage 3"),
    ("_hp_mapping", None, "ZeRO stage 1 or 2"),
]


@pytest.mark.parametrize(("mark", "value", "framework"), MARKS)
@pytest.mark.parametrize("maker", MAKERS)
def test_a_marked_parameter_is_refused_at_construction_by_name(maker, mark, value, framework):
    with pytest.raises(ValueError, match=rf"inner.flat is .*{framework}.*fully_shard"):
        MAKERS[maker]([("first", matrix()), ("inner.flat", marked(mark, value))])


@pytest.mark.parametrize("maker", MAKERS)
def test_a_marked_parameter_is_refused_in_a_later_group_which_leaves_nothing_behind(maker):
    optimizer = MAKERS[maker]([("first", matrix())])
    with pytest.raises(ValueError, match=r"late is partitioned by DeepSpeed ZeRO stage 3"):
        optimizer.add_param_group({"params": [("late", marked("ds_id", 3))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("maker", MAKERS)
def test_flat_partitions_that_took_the_place_of_matrices_are_refused_at_the_step(maker):
    held = [("first", matrix()), ("second", matrix()), ("bias", nn.Parameter(torch.randn(8)))]
    optimizer = MAKERS[maker](held)
    flat = nn.Parameter(torch.cat([parameter.detach().flatten() for _, parameter in held]))
    before = flat.detach().clone()
    # So do ZeRO-1, 2 and 3, and Megatron's distributed optimizer.
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.randn_like(flat)
    with pytest.raises(ValueError, match=r"group 0.* was made with 2 matrices and now holds vectors only.*\(72,\)"):
        optimizer.step()
    assert torch.equal(flat, before)


def test_groups_and_gradients_of_marked_parameters_are_refused_too():
    model = nn.Module()
    model.flat = marked("_is_flat_param")
    with pytest.raises(ValueError, match=r"'flat' is a flat parameter of FSDP1"):
        spectrim.param_groups(model)
    model.flat.grad = torch.ones(32)
    with pytest.raises(ValueError, match=r"flat parameter of FSDP1"):
        spectrim.clip_grad_spectral_([("flat", model.flat)], 1.0)


def test_parameters_that_are_swapped_for_others_of_their_shape_are_served():
    optimizer = spectrim.AdamW([matrix(), nn.Parameter(torch.randn(8))], clip="auto")
    group = optimizer.param_groups[0]
    group["params"] = [nn.Parameter(parameter.detach().clone()) for parameter in group["params"]]
    for parameter in group["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("role", [None, "vector"])
def test_nothing_but_long_vectors_is_warned_of_unless_they_are_said_to_be_vectors(role, recwarn):
    flat = nn.Parameter(torch.randn(20_000))
    said = {} if role is None else {"role": "vector", "layout": "vector"}
    optimizer = spectrim.AdamW([{"params": [flat], **said}], clip="auto")
    for _ in range(2):
        flat.grad = torch.ones_like(flat)
        optimizer.step()
    told = [str(w.message) for w in recwarn if "flat shards" in str(w.message)]
    assert len(told) == (role is None)


def fsdp1(rank: int) -> list[str]:
    """What is said to a model under FSDP1, in both of its forms."""
    said = []
    for original in (True, False):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        wrapped = FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))
        for make in (spectrim.param_groups, *(lambda m, f=f: f(m.named_parameters()) for f in MAKERS.values())):
            try:
                make(wrapped)
                said.append("taken")
            except ValueError as error:
                said.append(str(error))
    assert dist.get_world_size() == 2
    return said


def test_both_forms_of_fsdp1_are_refused_on_every_rank():
    for said in worlds.run(2, fsdp1):
        assert len(said) == 8
        assert all("FSDP1" in message and "fully_shard" in message for message in said), said
