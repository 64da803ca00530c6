"""The cost model: published shapes, operations against the operators' own, bytes by hand, pieces against FSDP2's."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import recorded_bytes
import spectrim
import worlds
from spectrim.kernels.adam import adam
from spectrim.kernels.momentum import momentum
from spectrim.lab.bench.counting import Counter
from spectrim.lab.errors import LabError
from spectrim.lab.planning.plan import SCALING_RECIPES, build_on_meta, from_configuration, optimizer_on_meta
from spectrim.lab.planning.scaling import active_parameters, cost, gathering, project, read_work
from spectrim.lab.planning.settings import Cluster, Hardware
from spectrim.operators.half import half_clip, half_polar
from spectrim.optim.spectral.clip import SoftClip
from spectrim.optim.spectral.orthogonalize import Orthogonalize


def on_meta(*shape: int, role: str = "matrix", layout: str = "matrix") -> list[dict[str, Any]]:
    parameter = nn.Parameter(torch.empty(shape, device="meta"))
    return [{"params": [("weight", parameter)], "role": role, "layout": layout}]


def small_mixture() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=6,
        num_experts_per_tok=2,
        vocab_size=96,
    )
    with torch.device("meta"):
        return from_configuration("small mixture", config)


def test_published_shapes_have_their_published_numbers_of_parameters() -> None:
    counts = {}
    for name in ("llama3-8b", "llama3-70b", "moe-1t"):
        model = build_on_meta(name)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        counts[name] = sum(parameter.numel() for parameter in model.parameters())
        work = read_work(spectrim.AdamW(spectrim.param_groups(model)))
        active = active_parameters(model, work)
        if name == "moe-1t":
            # 60 layers leave out 376 of 384 experts of three matrices.
            assert active == counts[name] - 60 * 376 * 3 * 2048 * 7168
            assert active == pytest.approx(32.9e9, rel=0.01)
        else:
            assert active == counts[name]
    # As the models' own cards round them; Llama's to the last digit.
    assert counts["llama3-8b"] == 8_030_261_248
    assert counts["llama3-70b"] == 70_553_706_496
    assert counts["moe-1t"] == pytest.approx(1.03e12, rel=0.01)


def orthogonalize_flops(m: int, n: int) -> float:
    """Operations of Muon's operator, as the planner takes them."""
    return Orthogonalize().flops(m, n)


@pytest.mark.parametrize(("m", "n"), [(64, 96), (300, 100), (1024, 14336), (7, 7)])
def test_operations_of_a_matrix_are_those_that_its_operator_runs(m: int, n: int) -> None:
    X = torch.empty(1, m, n, device="meta")
    with Counter() as counter:
        half_clip([X], [1.0])
    assert SoftClip().flops(m, n) == counter.flops
    with Counter() as counter:
        half_polar([X])
    assert Orthogonalize().flops(m, n) == counter.flops


@pytest.mark.parametrize("recipe", [*SCALING_RECIPES, "adamw+preclip+clip", "spectra+clip"])
def test_operations_of_a_model_are_those_that_the_optimizer_runs(recipe: str) -> None:
    model = small_mixture()
    optimizer = optimizer_on_meta(model, "small mixture", recipe)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()  # the first follows a spike from nothing
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    work, products = read_work(optimizer), counter.get_total_flops()
    # Spikes of several shapes go together, those of less rank padded, which the planner leaves out.
    within = 1e-2 if recipe.startswith("spectra") else 1e-12
    assert sum((sum(item.whole_flops) + item.spike_flops) * item.copies for item in work) == pytest.approx(
        products, rel=within
    )
    alone = cost(work, Cluster(world=1))
    entrywise = sum(item.entries * item.entry_flops for item in work)
    assert alone.flops == alone.busiest_flops == pytest.approx(products + entrywise, rel=within)
    assert alone.bytes_sent == alone.busiest_bytes_sent == 0


class PassesOver(TorchDispatchMode):
    """Counts the operations that touch every entry of a tensor of some size."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries, self.count = entries, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        self.count += not func.is_view and max(sizes, default=0) == self.entries
        return out


@pytest.mark.parametrize(
    ("make", "formula"),
    [
        (spectrim.AdamW, lambda g, s, t: adam(g, s, s.clone(), t, beta1=0.9, beta2=0.999, eps=1e-8)),
        (spectrim.Momentum, lambda g, s, t: momentum(g, s, decay=0.9, average=False, nesterov=True)),
        (spectrim.Muon, lambda g, s, t: momentum(g, s, decay=0.9, average=True, nesterov=True)),
    ],
)
def test_entries_cost_one_to_three_operations_in_every_pass_of_the_formula(make: Any, formula: Any) -> None:
    grad, state = torch.empty(64, 48, device="meta"), torch.empty(64, 48, device="meta")
    with PassesOver(grad.numel()) as passes:
        formula(grad, state, torch.empty((), device="meta"))
    assert passes.count <= 2 * make.recipe.direction.flops
    assert make.recipe.direction.flops <= 3 * passes.count


def test_bytes_of_one_matrix_are_those_of_the_formulas() -> None:
    m, n, four = 200, 400, Cluster(world=4)
    # Three numbers of the parameter and one of the step, summed by a ring of four: passed on twice, three quarters.
    number = 2 * 8 * 3 / 4
    scalars = 4 * number
    sent = {
        name: cost(read_work(make(on_meta(m, n), **options)), four).bytes_sent
        for name, make, options in (
            ("adamw", spectrim.AdamW, {}),
            ("shrink", spectrim.AdamW, {"shrink": 3.0}),
            ("clip", spectrim.AdamW, {"clip": 5.0}),
            ("both", spectrim.AdamW, {"clip": 5.0, "pre_clip": 0.1}),
            ("muon", spectrim.Muon, {}),
            ("spectra", spectrim.Spectra, {}),
        )
    }
    assert sent["adamw"] == scalars
    assert sent["shrink"] == scalars + number
    dense = 8 * m * n * 3 / 16
    assert sent["clip"] == sent["muon"] == dense + scalars
    assert sent["both"] == 2 * dense + scalars
    k = 3  # 1.5 % of 200
    small = (2 * k * k + k + 2) * 2 * 8 * 3 / 4  # two Gram matrices, lengths and two norms
    assert sent["spectra"] == 12 * k * n * 3 / 4 + small + scalars
    turned = read_work(spectrim.Spectra(on_meta(n, m, layout="transposed")))
    assert turned[0].matrices == ((m, n),)
    assert cost(turned, four).bytes_sent == 8 * k * m * 3 / 4 + small + scalars
    gathered = gathering(read_work(spectrim.Spectra(on_meta(m, n))), four)
    assert gathered.bytes_sent == 4 * m * n * 3 / 4 + scalars


def test_an_owner_does_its_matrices_alone_and_sends_them_back_alone() -> None:
    groups = [group for n in (64, 64, 64, 320) for group in on_meta(64, n)]
    groups = [{**group, "params": [(f"{i}", group["params"][0][1])]} for i, group in enumerate(groups)]
    for world, shares in ((2, ((320,), (64, 64, 64))), (64, ((320,),))):
        owned = cost(read_work(spectrim.Muon(groups)), Cluster(world=world))
        loads = [sum(orthogonalize_flops(64, n) for n in share) for share in shares]
        entrywise = 11 * 64 * 512 / world
        assert owned.busiest_flops == pytest.approx(max(loads) + entrywise, rel=1e-12)
        assert owned.flops == pytest.approx(
            (3 * orthogonalize_flops(64, 64) + orthogonalize_flops(64, 320)) / world + entrywise, rel=1e-12
        )
        away = (world - 1) / world
        scalars = (4 * 3 + 1) * 2 * 8 * away
        assert owned.busiest_bytes_sent == pytest.approx(4 * 64 * (320 + 512 / world) * away + scalars, rel=1e-12)


def test_replicas_of_everything_send_nothing_and_share_nothing() -> None:
    model = build_on_meta("tiny")
    for recipe in SCALING_RECIPES:
        work = read_work(optimizer_on_meta(model, "tiny", recipe))
        alone, many = cost(work, Cluster(world=1)), cost(work, Cluster(world=16, parallel="ddp"))
        assert many == alone
        assert many.bytes_sent == 0


def test_experts_stay_where_they_lie_and_the_rank_with_more_of_them_has_more_to_do() -> None:
    work = read_work(spectrim.Muon(on_meta(6, 64, 96, layout="stack")))
    each = orthogonalize_flops(64, 96)
    entries = 6 * 64 * 96
    for world, most in ((2, 3), (4, 2), (6, 1), (24, 1)):
        experts = cost(work, Cluster(world=world))
        assert experts.bytes_sent == 4 * 2 * 8 * (world - 1) / world
        assert experts.flops == pytest.approx((6 * each + 11 * entries) / world, rel=1e-12)
        assert experts.busiest_flops == pytest.approx(most * (each + 11 * entries / 6), rel=1e-12)
        assert experts.largest_state_bytes == pytest.approx(4 * entries * most / 6, rel=1e-12)
        assert experts.state_bytes == pytest.approx(4 * entries / world, rel=1e-12)


def test_replicated_shards_share_the_matrices_and_send_each_other_the_results() -> None:
    m, n = 64, 96
    work = read_work(spectrim.Muon(on_meta(m, n)))
    hybrid = cost(work, Cluster(world=8, parallel="hsdp", shard=4))
    # Three pieces to the owner, and seven back to all other ranks. All over eight.
    scalars, piece = 4 * 2 * 8 * 7 / 8, 4 * m * n / 4
    assert hybrid.bytes_sent == pytest.approx(10 * piece / 8 + scalars, rel=1e-12)
    assert hybrid.busiest_bytes_sent == pytest.approx(3 * piece / 8 + 7 * piece + scalars, rel=1e-12)
    assert hybrid.flops == pytest.approx(orthogonalize_flops(m, n) / 8 + 11 * m * n / 4, rel=1e-12)
    assert hybrid.state_bytes == 4 * m * n / 4
    assert cost(work, Cluster(world=8, parallel="hsdp", shard=8)) == cost(work, Cluster(world=8))
    # Twelve experts for eight owners. Three in four come from another rank, and go to all holders but the owner.
    experts = read_work(spectrim.Muon(on_meta(12, m, n, layout="stack")))
    spread = cost(experts, Cluster(world=8, parallel="hsdp", shard=4))
    assert spread.busiest_flops == pytest.approx(2 * orthogonalize_flops(m, n) + 11 * m * n * 3, rel=1e-12)
    assert spread.bytes_sent == pytest.approx(12 * 4 * m * n * (3 / 4 + 2 - 1 / 4) / 8 + scalars, rel=1e-12)


@pytest.fixture
def fake_ranks() -> Iterator[int]:
    torch.distributed.init_process_group("fake", rank=0, world_size=16, store=FakeStore())
    yield 16
    torch.distributed.destroy_process_group()


def test_the_first_ranks_state_is_that_of_its_pieces_under_fsdp2(fake_ranks: int) -> None:
    model = small_mixture()
    work = {recipe: read_work(optimizer_on_meta(model, "small mixture", recipe)) for recipe in ("adamw", "signum+clip")}
    fully_shard(model, mesh=init_device_mesh("cpu", (fake_ranks,)))
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    assert held > sum(parameter.numel() for parameter in model.parameters()) / fake_ranks
    assert cost(work["adamw"], Cluster(world=fake_ranks)).largest_state_bytes == pytest.approx(8 * held, rel=1e-12)
    assert cost(work["signum+clip"], Cluster(world=fake_ranks)).largest_state_bytes == pytest.approx(
        4 * held, rel=1e-12
    )


def test_state_of_a_real_model_is_that_of_its_recipes() -> None:
    model = build_on_meta("llama3-8b")
    entries = sum(parameter.numel() for parameter in model.parameters())
    matrices = entries - 2 * 128_256 * 4096 - 65 * 4096

    def state(recipe: str) -> float:
        return cost(read_work(optimizer_on_meta(model, "llama3-8b", recipe)), Cluster(world=64)).state_bytes * 64

    assert state("adamw") == 8 * entries
    assert state("ademamix+clip") == 12 * entries
    assert state("signum+clip") == 4 * entries
    assert state("muon") == 4 * matrices + 8 * (entries - matrices)
    # 1.5 % of 4096 and of 1024; the basis lies along the inputs.
    basis = 32 * (61 * 4096 * 4 + 15 * 4096 * 2 + 61 * 14_336)
    # And of each matrix the record of its norm.
    records = 32 * 7
    assert state("spectra") == state("muon") + 4 * basis + 4 * records


def test_the_share_of_a_step_is_the_busiest_ranks_time_over_all_of_it() -> None:
    work = read_work(spectrim.Muon(on_meta(64, 96)))
    cluster, hardware = Cluster(world=4), Hardware(flops=1e9, bandwidth=1e6, tokens=10)
    step = cost(work, cluster)
    seconds = step.busiest_flops / 1e9 + step.busiest_bytes_sent / 1e6
    projection = project("muon", work, cluster, hardware, active=64 * 96)
    assert projection.share == pytest.approx(seconds / (seconds + 6 * 64 * 96 * 10 / 1e9), rel=1e-12)
    slower = project("muon", work, cluster, Hardware(flops=1e9, bandwidth=1e5, tokens=10), active=64 * 96)
    assert slower.share > projection.share


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cluster(world=8, parallel="hsdp", shard=3), "--shard 3: hsdp on 8 ranks expects a divisor of 8"),
        (lambda: Cluster(world=8, parallel="hsdp"), "--shard is missing"),
        (lambda: Cluster(world=8, shard=4), "--shard 4: fsdp has no shard groups"),
        (lambda: Hardware.parse({"flops": -1.0}, source="test"), "flops=-1.0: input should be greater than 0"),
        (lambda: Hardware.parse({"bandwidth": math.nan}, source="test"), "bandwidth=nan: input should be a finite"),
        (lambda: Hardware.parse({"tokens": 0}, source="test"), "tokens=0: input should be greater than or equal to 1"),
    ],
)
def test_ranks_and_hardware_that_cannot_be_are_refused(make: Any, message: str) -> None:
    with pytest.raises(LabError, match=message):
        make()


def test_bytes_are_those_that_four_ranks_record() -> None:
    rows = worlds.run(recorded_bytes.RANKS, recorded_bytes.everything)[0]
    assert len(rows) == 2 * 2 * 6
    for row in rows:
        # Hosts compare options in every step, accelerators only in the first.
        mean = sum(size for sent in row["recorded"] for key, size in sent.items() if key != "agreement") / 4
        if (row["parallel"], row["model"]) == ("hsdp", "mixture") and row["recipe"] in DENSE:
            # An owner that holds an expert already is luck, of which the model takes the mean.
            assert 0.8 * row["projected"] < mean < 1.2 * row["projected"], row
        else:
            # Hosts see from a spike's norm that its tail's need not be summed.
            assert 0.99 * row["projected"] < mean <= row["projected"] * (1 + 1e-12), row


DENSE = ("signum+clip", "adamw+preclip+clip", "spectra+clip", "muon")
"""Recipes whose matrices must be whole."""
