"""SpectralClipping around torch's optimizers and others: against the bare base, and against clipping in float64."""

import copy
import io
import pickle

import pytest
import pytorch_optimizer
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import reference_optimizers as reference
import spectrim
from spectrim import SpectralClipping
from spectrim.optim.rules.schedule import clip_threshold, peak_lr_of

LR, DECAY, CLIP = 1e-2, 0.1, 0.5


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def outside(name, **options):
    """An optimizer of the pytorch-optimizer package."""
    return lambda params: getattr(pytorch_optimizer, name)(params, lr=LR, **options)


def inside(name, **options):
    return lambda params: getattr(torch.optim, name)(params, lr=LR, **options)


# How to make a base, given parameters, and what its decay is.
BASES = {
    "AdamW": (inside("AdamW", weight_decay=DECAY), "decoupled"),
    "AdamW fused": (inside("AdamW", weight_decay=DECAY, fused=True), "decoupled"),
    "AdamW ascending": (inside("AdamW", weight_decay=DECAY, maximize=True), "decoupled"),
    "Adam": (inside("Adam", weight_decay=DECAY, amsgrad=True), "coupled"),
    "NAdam": (inside("NAdam", weight_decay=DECAY), "coupled"),
    "NAdam decoupled": (inside("NAdam", weight_decay=DECAY, decoupled_weight_decay=True), "decoupled"),
    "RMSprop": (inside("RMSprop", weight_decay=DECAY, momentum=0.9), "coupled"),
    "SGD": (inside("SGD", weight_decay=DECAY, momentum=0.9, nesterov=True), "coupled"),
    "SGD ascending": (inside("SGD", weight_decay=DECAY, momentum=0.9, maximize=True), "coupled ascending"),
    "Adafactor": (inside("Adafactor", weight_decay=DECAY), "direct"),
    "AdEMAMix": (outside("AdEMAMix", weight_decay=DECAY), "coupled"),
    "AdEMAMix decoupled": (outside("AdEMAMix", weight_decay=DECAY, weight_decouple=True), "decoupled"),
    "Lion": (outside("Lion", weight_decay=DECAY), "decoupled"),
    "Lion ascending": (outside("Lion", weight_decay=DECAY, maximize=True), "decoupled"),
    "Lion fixed": (outside("Lion", weight_decay=DECAY * LR, fixed_decay=True), "fixed"),
    "MARS": (outside("MARS", weight_decay=DECAY, optimize_1d=True), "decoupled"),
    "SOAP": (outside("SOAP", weight_decay=DECAY, precondition_frequency=4), "decoupled after one"),
}
every_base = pytest.mark.parametrize(("make", "decay"), BASES.values(), ids=BASES.keys())
a_few_bases = pytest.mark.parametrize(
    "make",
    [BASES[name][0] for name in ("AdamW", "SGD", "Adafactor", "SOAP")],
    ids=["AdamW", "SGD", "Adafactor", "SOAP"],
)


def small_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    layers = (nn.Embedding(11, 12), nn.Linear(12, 20), nn.LayerNorm(20), nn.Linear(20, 12), nn.Linear(12, 20))
    return nn.Sequential(*layers).to(dtype)


def train(model, optimizer, steps, first=0, scheduler=None):
    for step in range(first, first + steps):
        tokens = torch.randint(11, (32,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(tokens).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def flatten(value):
    if isinstance(value, torch.Tensor):
        return [value.detach().clone()]
    if isinstance(value, dict):
        return [tensor for _, each in sorted(value.items()) for tensor in flatten(each)]
    return [tensor for each in value for tensor in flatten(each)] if isinstance(value, list) else []


def tensors(model, optimizer):
    return [*flatten(list(model.parameters())), *flatten([dict(optimizer.state[p]) for p in model.parameters()])]


def assert_same(actual, expected):
    for mine, its in zip(actual, expected, strict=True):
        assert torch.equal(mine, its)


def assert_close(model, other, rtol=1e-9, atol=1e-12):
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=rtol, atol=atol)


def gradients(shape, steps, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    common = torch.randn(shape, generator=generator, dtype=torch.float64)
    return [(common + torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(steps)]


# -- What it computes --------------------------------------------------------------------------------------------------


@every_base
def test_without_a_threshold_it_is_the_bare_base(make, decay):
    model, twin = small_model(torch.float64), small_model(torch.float64)
    train(model, SpectralClipping(make(model.parameters()), clip=None), 20)
    train(twin, make(twin.parameters()), 20)
    assert_close(model, twin)
    with pytest.raises(AssertionError):
        assert_close(model, small_model(torch.float64))


@every_base
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (30,)])
def test_with_a_threshold_it_clips_what_the_base_adds_to_zeros(make, decay, shape):
    """The direction comes from a bare base without decay, which steps on weights of its own."""
    start, grads = torch.randn(shape, dtype=torch.float64), gradients(shape, 12)
    parameter = nn.Parameter(start.clone())
    optimizer = SpectralClipping(make([parameter]), clip=CLIP)
    source = nn.Parameter(torch.zeros_like(start))
    bare = make([source])
    for key in [key for key in bare.param_groups[0] if key.startswith("weight_decay")]:
        bare.param_groups[0][key] = 0.0
    X = start.clone()
    for step, grad in enumerate(grads):
        parameter.grad = grad.clone()
        optimizer.step()
        sign = {"coupled": 1, "coupled ascending": -1}.get(decay, 0)
        source.grad = grad + sign * DECAY * X
        before = X if decay == "direct" else torch.zeros_like(X)
        source.data.copy_(before)
        bare.step()
        U = (before - source.detach()) / LR
        decays = not sign and not (decay == "decoupled after one" and step == 0)
        X = (1 - LR * DECAY if decays else 1) * X - LR * reference.clip(U, CLIP)
    torch.testing.assert_close(parameter.detach(), X, rtol=0, atol=1e-3 * LR * CLIP)
    assert not torch.allclose(X, start, rtol=0, atol=LR * CLIP / 10)


@pytest.mark.parametrize(
    ("clip", "scope", "form"), [(0.3, "all", "soft"), ("auto", "all", "hard"), ("auto", "matrices", "soft")]
)
def test_around_adamw_it_is_our_adamw(clip, scope, form):
    models = small_model(), small_model()
    groups = [spectrim.param_groups(model, embedding_lr=3.0) for model in models]
    options = {"clip_scope": scope, "warmup_steps": 10, "total_steps": 100, "clip_decay": "linear", "clip_form": form}
    theirs = torch.optim.AdamW(groups[0], lr=LR, weight_decay=DECAY)
    optimizers = [
        SpectralClipping(theirs, clip=clip, **options),
        spectrim.AdamW(groups[1], lr=LR, weight_decay=DECAY, clip=clip, **options),
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 10, 1.0))
        train(model, optimizer, 100, scheduler=scheduler)
    assert_close(*models, rtol=0, atol=1e-5)


def test_groups_say_how_a_parameter_is_read():
    whole = nn.Parameter(torch.randn(20, 30))
    parts = [nn.Parameter(part.clone().contiguous()) for part in whole.detach().mT.split((12, 18))]
    group = {"params": [whole], "role": "matrix", "layout": "transposed", "split": (12, 18)}
    optimizers = [SpectralClipping(torch.optim.AdamW(params, lr=LR), clip=CLIP) for params in ([group], parts)]
    for grad in gradients((20, 30), 5, torch.float32):
        whole.grad = grad
        for part, its in zip(parts, grad.mT.split((12, 18)), strict=True):
            part.grad = its.contiguous()
        for optimizer in optimizers:
            optimizer.step()
    for mine, its in zip(whole.detach().mT.split((12, 18)), parts, strict=True):
        torch.testing.assert_close(mine, its.detach(), rtol=1e-4, atol=1e-5)


@every_base
def test_bfloat16_weights_follow_float32_ones_or_are_refused(make, decay):
    # Small weights: their rounding must not hide the steps.
    start, grads = 0.01 * torch.randn(24, 40).bfloat16(), gradients((24, 40), 10, torch.bfloat16)
    parameters = [nn.Parameter(start.clone()), nn.Parameter(start.float())]
    if decay == "direct":
        with pytest.raises(ValueError, match=r"cannot wrap Adafactor for parameters of torch\.bfloat16.*float32"):
            SpectralClipping(make(parameters[:1]), clip=CLIP)
        return
    for parameter in parameters:
        optimizer = SpectralClipping(make([parameter]), clip=CLIP)
        for grad in grads:
            parameter.grad = grad.to(parameter.dtype)
            optimizer.step()
    assert parameters[0].dtype == torch.bfloat16
    error = (parameters[0].detach().float() - parameters[1].detach()).norm()
    moved = (parameters[1].detach() - start.float()).norm()
    # State of two digits turns some signs of Lion, and the eigenvectors of SOAP.
    assert error < (0.4 if type(optimizer.base).__name__ in ("Lion", "SOAP") else 0.03) * moved


def test_a_learning_rate_as_a_tensor_is_followed():
    model, twin = small_model(), small_model()
    tensor = SpectralClipping(torch.optim.AdamW(model.parameters(), lr=torch.tensor(LR)), clip=CLIP)
    number = SpectralClipping(torch.optim.AdamW(twin.parameters(), lr=LR), clip=CLIP)
    train(model, tensor, 5)
    train(twin, number, 5)
    assert_close(model, twin, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
@a_few_bases
def test_at_learning_rate_zero_nothing_moves_and_the_base_counts_on(make, lr):
    model = small_model()
    optimizer = SpectralClipping(make(model.parameters()), clip=CLIP)
    train(model, optimizer, 3)
    weights, state = flatten(list(model.parameters())), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.param_groups[0]["lr"] = lr
    if isinstance(lr, torch.Tensor):
        optimizer.param_groups[0]["foreach"] = False
    train(model, optimizer, 1)
    assert_same(flatten(list(model.parameters())), weights)
    if not isinstance(lr, torch.Tensor):
        assert optimizer.param_groups[0]["steps_taken"] == 3
    assert any(
        not torch.equal(mine, its)
        for mine, its in zip(flatten(optimizer.state_dict()["state"]), flatten(state), strict=True)
    )


def test_at_learning_rate_zero_a_decay_of_its_own_rests_too():
    parameter = nn.Parameter(torch.ones(4, 4))
    optimizer = SpectralClipping(BASES["Lion fixed"][0]([parameter]), clip=CLIP)
    optimizer.param_groups[0]["lr"] = 0.0
    parameter.grad = torch.ones(4, 4)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(4, 4))


def test_a_decay_that_is_switched_on_later_is_noticed():
    model, twin = small_model(torch.float64), small_model(torch.float64)
    optimizer = SpectralClipping(torch.optim.SGD(model.parameters(), lr=LR), clip=None)
    bare = torch.optim.SGD(twin.parameters(), lr=LR)
    for each in (optimizer, bare):
        each.param_groups[0]["weight_decay"] = DECAY
    train(model, optimizer, 5)
    train(twin, bare, 5)
    assert_close(model, twin)


def test_zero_gradients_decay_under_the_fused_kernel_too():
    parameter = nn.Parameter(torch.ones(4, 4))
    optimizer = SpectralClipping(torch.optim.AdamW([parameter], lr=LR, weight_decay=DECAY, fused=True), clip=CLIP)
    parameter.grad = torch.zeros(4, 4)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((4, 4), 1 - LR * DECAY))


# -- What is refused ---------------------------------------------------------------------------------------------------


def _lookahead(params):
    return pytorch_optimizer.Lookahead(torch.optim.AdamW(params))


class Remembering(torch.optim.Optimizer):
    """Steps by as much as the weight was long in the step before."""

    def __init__(self, params):
        super().__init__(params, {"lr": LR})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            length = self.state[parameter].get("length", 1.0)
            self.state[parameter]["length"] = parameter.norm()
            parameter.sub_(LR * length * parameter.grad)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Remembering, "Remembering: with these options, "),
        (inside("LBFGS"), "LBFGS: its step needs a closure"),
        (inside("SparseAdam"), "SparseAdam: a step on a small dense parameter .* failed with RuntimeError"),
        (inside("ASGD"), "ASGD: with these options, .* its state holds weights"),
        (outside("Prodigy"), "Prodigy: with these options, "),
        (outside("Ranger"), "Ranger: with these options, "),
        (
            outside("Adan", weight_decay=DECAY),
            "Adan: with these options, .* does not separate into a decay and a change",
        ),
        (_lookahead, "Lookahead: it wraps another optimizer, 'optimizer'"),
        (outside("ScheduleFreeAdamW"), "'warmup_steps' is an option of both ScheduleFreeAdamW"),
    ],
)
def test_what_cannot_be_wrapped_is_refused_by_name_and_left_as_it_was(make, message):
    parameter = nn.Parameter(torch.randn(6, 4))
    parameter.grad = torch.randn(6, 4)
    before = parameter.detach().clone()
    base = make([parameter])
    groups = [dict(group) for group in base.param_groups]
    with pytest.raises(ValueError, match=message):
        SpectralClipping(base)
    assert torch.equal(parameter, before)
    assert [dict(group) for group in base.param_groups] == groups


def test_complex_parameters_are_refused_by_name():
    number = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"group 0, parameter 0 is a Parameter of torch\.complex64"):
        SpectralClipping(torch.optim.AdamW([number]))


def test_our_own_optimizers_and_wrappers_are_refused():
    parameter = nn.Parameter(torch.randn(6, 4))
    with pytest.raises(TypeError, match="cannot wrap Muon"):
        SpectralClipping(spectrim.Muon([parameter]))
    with pytest.raises(ValueError, match="cannot wrap SpectralClipping: it wraps another"):
        SpectralClipping(SpectralClipping(torch.optim.AdamW([parameter])))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clip": -1.0}, ValueError, "clip=-1.0"),
        ({"clip_decay": "cosine"}, ValueError, "total_steps=None"),
        ({"clip_scope": "some"}, ValueError, "clip_scope='some'"),
        ({"maximize": True}, TypeError, "'maximize'.*warmup_steps"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        SpectralClipping(torch.optim.AdamW([nn.Parameter(torch.ones(2, 2))]), **options)


def test_group_options_that_nobody_has_are_named():
    groups = spectrim.param_groups(small_model(), overrides={"1.weight": {"shrink": 2.0}})
    with pytest.raises(ValueError, match=r"shrink=2.0 for group \d of AdamW"):
        SpectralClipping(torch.optim.AdamW(groups))


def test_an_automatic_threshold_needs_a_peak_learning_rate():
    parameter = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"peak_lr=0.0 for group 0"):
        SpectralClipping(torch.optim.AdamW([parameter], lr=0.0))
    assert SpectralClipping(torch.optim.AdamW([parameter], lr=0.0), peak_lr=1e-3).param_groups[0]["peak_lr"] == 1e-3


def test_options_that_need_a_device_do_not_keep_a_probe_from_running_on_the_host():
    base = torch.optim.AdamW([nn.Parameter(torch.ones(2, 2))], capturable=True)
    assert SpectralClipping(base).param_groups[0]["capturable"] is True


def test_a_probe_disturbs_nothing():
    model, calls = small_model(), []
    base = torch.optim.AdamW(model.parameters(), lr=LR)
    train(model, base, 2)
    base.register_step_pre_hook(lambda *_: calls.append(1))
    torch.optim.lr_scheduler.ConstantLR(base)  # replaces base.step by one bound to the base
    before, random = tensors(model, base), torch.get_rng_state()
    SpectralClipping(base)
    assert_same(tensors(model, base), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert calls == []
    assert set(base.state) == set(model.parameters())


# -- Faults ------------------------------------------------------------------------------------------------------------


@a_few_bases
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_non_finite_gradient_skips_the_whole_step(make, bad):
    model = small_model()
    optimizer = SpectralClipping(make(list(model.named_parameters())), clip=CLIP)
    train(model, optimizer, 3)
    before = tensors(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
    victim = model[1].weight
    victim.grad[3, 2] = bad
    given = victim.grad
    optimizer.step()
    assert victim.grad is given
    assert_same(tensors(model, optimizer), before)
    assert optimizer.skipped_steps() == {"1.weight": 1}


def test_raising_names_the_parameter_and_moves_nothing():
    model = small_model()
    optimizer = SpectralClipping(torch.optim.AdamW(list(model.named_parameters())), on_nonfinite="raise")
    train(model, optimizer, 2)
    before = tensors(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model[4].weight.grad[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"4\.weight"):
        optimizer.step()
    assert_same(tensors(model, optimizer), before)


@a_few_bases
def test_weights_and_gradients_are_back_when_the_base_fails(make):
    model = small_model()
    optimizer = SpectralClipping(make(model.parameters()), clip=CLIP)
    train(model, optimizer, 2)
    weights, given = flatten(list(model.parameters())), [parameter.grad for parameter in model.parameters()]

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = optimizer.base.register_step_post_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert_same(flatten(list(model.parameters())), weights)
    assert all(parameter.grad is grad for parameter, grad in zip(model.parameters(), given, strict=True))
    handle.remove()
    train(model, optimizer, 1)
    assert not torch.equal(model[1].weight, weights[1])


@every_base
def test_gradients_are_left_as_they_were(make, decay):
    parameter = nn.Parameter(torch.randn(6, 4))
    optimizer = SpectralClipping(make([parameter]), clip=CLIP)
    for grad in gradients((6, 4), 3, torch.float32):
        parameter.grad = given = grad.clone()
        optimizer.step()
        assert parameter.grad is given
        assert torch.equal(given, grad)


def test_parameters_without_a_gradient_and_empty_ones_are_served():
    parameters = [nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(0, 6)), nn.Parameter(torch.randn(3))]
    optimizer = SpectralClipping(torch.optim.AdamW(parameters, lr=LR), clip=CLIP)
    parameters[0].grad, parameters[1].grad = torch.randn(4, 6), torch.randn(0, 6)
    before = parameters[2].detach().clone()
    optimizer.step()
    assert torch.equal(parameters[2], before)


# -- State -------------------------------------------------------------------------------------------------------------


@a_few_bases
def test_a_resumed_run_continues_bit_for_bit(make):
    whole, first, second = small_model(), small_model(), small_model(seed=9)
    optimizer, half = (
        SpectralClipping(make(spectrim.param_groups(model)), clip="auto", warmup_steps=6) for model in (whole, first)
    )
    train(whole, optimizer, 8)
    train(first, half, 4)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": half.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second.load_state_dict(saved["model"])
    resumed = SpectralClipping(make(spectrim.param_groups(second)), clip=3.0)
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.param_groups is resumed.base.param_groups
    assert resumed.state is resumed.base.state
    train(second, resumed, 4, first=4)
    assert_same(tensors(second, resumed), tensors(whole, optimizer))


@a_few_bases
def test_the_state_dict_functions_of_distributed_checkpointing_resume_it(make):
    model, fresh = small_model(), small_model(seed=9)
    optimizer, resumed = (SpectralClipping(make(spectrim.param_groups(m)), clip=CLIP) for m in (model, fresh))
    train(model, optimizer, 4)
    saved = copy.deepcopy((model.state_dict(), get_optimizer_state_dict(model, optimizer)))
    set_optimizer_state_dict(fresh, resumed, saved[1])
    fresh.load_state_dict(saved[0])
    train(model, optimizer, 3, first=4)
    train(fresh, resumed, 3, first=4)
    assert_same(tensors(fresh, resumed), tensors(model, optimizer))


def test_checkpoints_of_the_bare_base_load_into_either():
    source, model = small_model(), small_model(seed=9)
    bare = torch.optim.AdamW(source.parameters(), lr=LR)
    train(source, bare, 3)
    base = torch.optim.AdamW(model.parameters(), lr=1.0)
    optimizer = SpectralClipping(base, clip=CLIP)
    for load in (optimizer.load_state_dict, base.load_state_dict):
        load(bare.state_dict())
        assert optimizer.param_groups is base.param_groups
        assert optimizer.param_groups[0]["clip"] == CLIP
        assert optimizer.param_groups[0]["lr"] == LR
        assert optimizer.state[model[1].weight]["step"] == 3


@pytest.mark.parametrize("when", ["wrapped in its decay", "loaded in its decay"])
def test_a_bare_base_in_its_decay_has_no_warm_up(when):
    source, model = small_model(), small_model(seed=9)
    bare = torch.optim.AdamW(source.parameters(), lr=LR)
    train(source, bare, 3, scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(bare, 4))
    assert 0 < bare.param_groups[0]["lr"] < LR
    if when == "wrapped in its decay":
        optimizer = SpectralClipping(bare, clip=CLIP)
    else:
        optimizer = SpectralClipping(torch.optim.AdamW(model.parameters(), lr=LR), clip=CLIP)
        optimizer.load_state_dict(bare.state_dict())
    assert clip_threshold(optimizer.param_groups[0]) == CLIP


def test_a_saved_group_without_a_warm_up_keeps_none():
    model, fresh = small_model(), small_model()
    saved = SpectralClipping(torch.optim.AdamW(model.parameters(), lr=LR), clip=CLIP, warmup_steps=0)
    optimizer = SpectralClipping(torch.optim.AdamW(fresh.parameters(), lr=LR), clip=CLIP)
    optimizer.load_state_dict(saved.state_dict())
    assert optimizer.param_groups[0]["warmup_steps"] == 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_and_pickles_go_on_alike(duplicate):
    model = small_model()
    optimizer = SpectralClipping(torch.optim.AdamW(model.parameters(), lr=LR), clip=CLIP)
    train(model, optimizer, 3)
    twin, other = duplicate((model, optimizer))
    assert other.param_groups is other.base.param_groups
    train(model, optimizer, 3, first=3)
    train(twin, other, 3, first=3)
    assert_same(tensors(twin, other), tensors(model, optimizer))


@pytest.mark.parametrize("which", ["wrapper", "base"])
def test_a_group_can_be_added_to_either(which):
    model = small_model()
    optimizer = SpectralClipping(torch.optim.AdamW(model[1].parameters(), lr=LR), clip=CLIP)
    chosen = optimizer if which == "wrapper" else optimizer.base
    chosen.add_param_group({"params": list(model[3].parameters()), "lr": LR / 2})
    before = model[3].weight.detach().clone()
    train(model, optimizer, 1)
    assert len(optimizer.param_groups) == 2
    assert optimizer.param_groups[1]["clip"] == CLIP
    assert peak_lr_of(optimizer.param_groups[1]) == LR / 2
    assert not torch.equal(model[3].weight, before)


def test_a_group_that_cannot_be_served_is_not_added():
    optimizer = SpectralClipping(torch.optim.Adafactor([nn.Parameter(torch.ones(2, 2))], lr=LR))
    with pytest.raises(ValueError, match="bfloat16"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))]})
    assert len(optimizer.param_groups) == 1


# -- torch.optim's promises --------------------------------------------------------------------------------------------


def test_it_is_an_optimizer_and_describes_itself():
    model = small_model()
    optimizer = SpectralClipping(torch.optim.NAdam(spectrim.param_groups(model), lr=LR), clip_scope="matrices")
    assert isinstance(optimizer, torch.optim.Optimizer)
    rules = {row.name: row.rule for row in spectrim.describe(optimizer).rows}
    assert (rules["1.weight"], rules["1.bias"]) == ("NAdam → clip", "NAdam")


@pytest.mark.parametrize("which", ["wrapper", "base"])
def test_a_scheduler_on_either_drives_both(which):
    model = small_model()
    optimizer = SpectralClipping(torch.optim.AdamW(model.parameters(), lr=LR), clip=CLIP)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer if which == "wrapper" else optimizer.base, lambda step: step
    )
    before = flatten(list(model.parameters()))
    train(model, optimizer, 1, scheduler=scheduler)
    assert_same(flatten(list(model.parameters())), before)
    assert optimizer.param_groups[0]["lr"] == optimizer.base.param_groups[0]["lr"] == LR
    train(model, optimizer, 1)
    assert not torch.equal(model[1].weight, before[1])


def test_a_scheduler_made_before_the_wrapper_tells_the_peak():
    base = torch.optim.AdamW([nn.Parameter(torch.ones(2, 2))], lr=LR)
    torch.optim.lr_scheduler.LambdaLR(base, lambda step: step / 10)
    assert base.param_groups[0]["lr"] == 0
    assert peak_lr_of(SpectralClipping(base).param_groups[0]) == LR
    cycled = torch.optim.AdamW([nn.Parameter(torch.ones(2, 2))], lr=LR)
    torch.optim.lr_scheduler.OneCycleLR(cycled, max_lr=0.5, total_steps=10)
    assert peak_lr_of(SpectralClipping(cycled).param_groups[0]) == 0.5


def test_one_cycle_schedules_of_momentum_work():
    model = small_model()
    optimizer = SpectralClipping(torch.optim.AdamW(model.parameters(), lr=LR), clip=CLIP)
    train(model, optimizer, 5, scheduler=torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=10))
    assert len(optimizer._decompositions) == 2  # matrices and vectors, probed once


def test_hooks_of_both_run_and_a_closure_sees_the_weights():
    model = small_model()
    optimizer = SpectralClipping(torch.optim.AdamW(model.parameters(), lr=LR), clip=CLIP)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("wrapper before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("wrapper after"))
    optimizer.base.register_step_pre_hook(lambda *_: calls.append("base before"))
    optimizer.base.register_step_post_hook(lambda *_: calls.append("base after"))
    tokens = torch.arange(11)
    losses = [model(tokens).square().mean().item()]

    def closure():
        optimizer.zero_grad()
        loss = model(tokens).square().mean()
        loss.backward()
        return loss

    for _ in range(5):
        losses.append(optimizer.step(closure).item())
    assert calls == ["wrapper before", "base before", "base after", "wrapper after"] * 5
    assert losses[0] == losses[1]
    assert losses[-1] < losses[1]


def test_hooks_of_loading_run():
    optimizer = SpectralClipping(torch.optim.AdamW([nn.Parameter(torch.ones(2, 2))]))
    calls = []
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1})
    saved = optimizer.state_dict()
    assert saved["extra"] == 1
    optimizer.load_state_dict(saved)
    assert calls == ["before", "after"]


def test_a_gradient_scaler_drives_it():
    model, twin = small_model(), small_model()
    scaled, plain = (SpectralClipping(torch.optim.AdamW(m.parameters(), lr=LR), clip=CLIP) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        tokens = torch.randint(11, (32,), generator=torch.Generator().manual_seed(step))
        scaled.zero_grad()
        scaler.scale(model(tokens).square().mean()).backward()
        scaler.step(scaled)
        scaler.update()
    train(twin, plain, 3)
    assert_close(model, twin, rtol=1e-4, atol=1e-5)
