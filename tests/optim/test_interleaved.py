"""Fused projections whose outputs take turns, against the same optimizer on the projections as separate matrices."""

import pytest
import torch
from torch import Tensor, nn

import spectrim
from spectrim.monitor.subjects import subjects_of
from spectrim.monitor.update_sampler import UpdateSampler
from spectrim.optim.grouping.layout import matrices, matrix_shapes, put_back

# Layout, shape, sizes of one turn: queries, keys and values of two groups; gate and up projections of experts.
FUSED = {
    "rows": ("matrix", (20, 7), (6, 2, 2)),
    "stored transposed": ("transposed", (7, 20), (6, 2, 2)),
    "experts": ("stack", (3, 12, 5), (1, 1)),
    "transposed experts": ("transposed_stack", (3, 5, 12), (1, 1)),
    "a convolution": ("flatten", (12, 2, 2, 2), (2, 4)),
}
RECIPES = {
    "adamw": lambda groups: spectrim.AdamW(groups, lr=1e-2),
    "adamw+clip": lambda groups: spectrim.AdamW(groups, lr=1e-2, clip=0.7),
    "adamw+preclip": lambda groups: spectrim.AdamW(groups, lr=1e-2, pre_clip=0.5),
    "adamw+shrink": lambda groups: spectrim.AdamW(groups, lr=1e-2, shrink=1.0),
    "adamw+shrunk directions": lambda groups: spectrim.AdamW(groups, lr=1e-2, shrink=1.0, shrink_at="direction"),
    "muon": lambda groups: spectrim.Muon(groups, lr=1e-2),
    "spectra+clip": lambda groups: spectrim.Spectra(groups, lr=1e-2, rank_ratio=0.4, clip=0.1),
    "wrapped": lambda groups: spectrim.SpectralClipping(torch.optim.AdamW(groups, lr=1e-2), 0.7),
}


def separated(tensor: Tensor, layout: str, sizes: tuple[int, ...]) -> list[Tensor]:
    """The projections, worked out row by row."""
    if layout in ("transposed", "transposed_stack"):
        tensor = tensor.mT
    elif layout == "flatten":
        tensor = tensor.flatten(1)
    owners = [part for part, size in enumerate(sizes) for _ in range(size)]
    rows = [owners[row % len(owners)] for row in range(tensor.shape[-2])]
    return [tensor[..., [row for row, owner in enumerate(rows) if owner == part], :] for part in range(len(sizes))]


@pytest.mark.parametrize("case", FUSED)
def test_parts_are_the_projections_and_are_written_back_to_their_places(case):
    layout, shape, sizes = FUSED[case]
    tensor = torch.randn(shape)
    split = ("interleaved", *sizes)
    parts = matrices(tensor, layout, split)
    for part, expected in zip(parts, separated(tensor, layout, sizes), strict=True):
        assert torch.equal(part, expected)
    assert matrix_shapes(shape, layout, split) == [tuple(part.shape) for part in parts]
    before = tensor.clone()
    put_back([part * 2 for part in parts], tensor, layout, split)
    assert torch.equal(tensor, before * 2)


@pytest.mark.parametrize("case", FUSED)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_fused_projection_steps_as_its_projections_do(recipe, case):
    layout, shape, sizes = FUSED[case]
    torch.manual_seed(0)
    fused = nn.Parameter(torch.randn(shape))
    apart = [nn.Parameter(part.clone()) for part in separated(fused.detach(), layout, sizes)]
    group = {"role": "matrix", "layout": layout, "split": ("interleaved", *sizes)}
    together = RECIPES[recipe]([{"params": [fused], **group}])
    single = RECIPES[recipe](
        [{"params": apart, "role": "matrix", "layout": "stack" if apart[0].ndim > 2 else "matrix"}]
    )
    for _ in range(3):
        fused.grad = torch.randn(shape)
        for parameter, grad in zip(apart, separated(fused.grad, layout, sizes), strict=True):
            parameter.grad = grad.clone()
        together.step()
        single.step()
    for part, expected in zip(separated(fused.detach(), layout, sizes), apart, strict=True):
        torch.testing.assert_close(part, expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", FUSED)
def test_gradients_of_fused_projections_are_clipped_and_shrunk_as_those_of_the_projections(case):
    layout, shape, sizes = FUSED[case]
    for function in (lambda p: spectrim.clip_grad_spectral_(p, 0.5), lambda p: spectrim.shrink_grad_(p, 1.0)):
        fused = nn.Parameter(torch.zeros(shape))
        fused.grad = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        apart = [nn.Parameter(torch.zeros_like(part)) for part in separated(fused.grad, layout, sizes)]
        for parameter, grad in zip(apart, separated(fused.grad, layout, sizes), strict=True):
            parameter.grad = grad.clone()
        function([{"params": [fused], "layout": layout, "role": "matrix", "split": ("interleaved", *sizes)}])
        function(apart)
        for part, parameter in zip(separated(fused.grad, layout, sizes), apart, strict=True):
            torch.testing.assert_close(part, parameter.grad, rtol=1e-5, atol=1e-6)


def test_a_pattern_declares_turns_and_describe_shows_them():
    model = nn.ModuleDict({"wqkv": nn.Linear(8, 40)})
    optimizer = spectrim.Muon(spectrim.param_groups(model, split={"*wqkv*": ("interleaved", 12, 4, 4)}))
    row = spectrim.describe(optimizer).rows[0]
    assert row.matrix == "(24, 8) + (8, 8) + (8, 8), interleaved"
    assert optimizer.param_groups[0]["split"] == ("interleaved", 12, 4, 4)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (("interleaved", 12, 4, 5), r"sum to a divisor of 40"),
        (("interleaved",), r"expected sizes along the outputs"),
        (("in turns", 12, 4, 4), r"expected sizes along the outputs"),
        (("interleaved", 12, 0, 4, 4), r"must be positive"),
        ("interleaved", r"expected sizes along the outputs"),
    ],
)
def test_turns_that_do_not_fit_are_refused_by_name(split, message):
    model = nn.ModuleDict({"wqkv": nn.Linear(8, 40)})
    with pytest.raises(ValueError, match=rf"'wqkv.weight'.*{message}"):
        spectrim.param_groups(model, split={"wqkv.*": split})


def test_a_monitor_measures_the_projections_and_what_they_moved():
    torch.manual_seed(0)
    model = nn.ModuleDict({"wqkv": nn.Linear(8, 40, bias=False)})
    optimizer = spectrim.AdamW(spectrim.param_groups(model, split={"*wqkv*": ("interleaved", 12, 4, 4)}), lr=1e-2)
    records = []
    with spectrim.SpectralMonitor(model, optimizer, every=1, out=records.append):
        for _ in range(2):
            before = model["wqkv"].weight.detach().clone()
            model["wqkv"].weight.grad = torch.randn(40, 8)
            optimizer.step()
    moved = separated(before - model["wqkv"].weight.detach(), "matrix", (12, 4, 4))
    for part, change in enumerate(moved):
        measured = records[-1]["parameters"][f"wqkv.weight[{part}]"]
        assert measured["update_norm"] == pytest.approx(float(change.norm()), rel=1e-4)
        assert measured["update_spectral_norm"] == pytest.approx(float(torch.linalg.matrix_norm(change, 2)), rel=0.03)


def test_a_watch_of_every_step_sees_each_projection():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(40, 8))
    group = {"params": [weight], "role": "matrix", "layout": "matrix", "split": ("interleaved", 12, 4, 4)}
    model = nn.ParameterDict({"wqkv": weight})
    watch = UpdateSampler(subjects_of(model, [group]))
    # Only what lies in the keys moves.
    keys = separated(torch.arange(320).reshape(40, 8), "matrix", (12, 4, 4))[1].flatten()
    for step in range(2):
        watch.before()
        with torch.no_grad():
            weight.view(-1)[keys] += 0.5
        watch.after(step, [group])
    taken = watch.take()
    for _, values in taken.read(taken.tensors()):
        rms = [values[f"wqkv[{part}]"]["update_rms"] for part in range(3)]
        assert rms == pytest.approx([0.0, 0.5, 0.0])
