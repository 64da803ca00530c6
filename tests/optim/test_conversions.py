"""Settings of other optimizers carried over, as docs/tuning.md has them: the same weights after the same gradients.

torch's optimizers run themselves. Of the authors' SPECTRA (mlolab/llm-spectral-clipping) and of dion (microsoft/dion)
the steps are written here as the formulas that their code computes, with exact singular values.
"""

import math

import pytest
import torch
from torch import Tensor, nn

import oracle
import spectrim

STEPS = 6
SHAPES = ((18, 8), (8, 18), (8, 8))


class Layers(nn.Module):
    """One weight of every kind, and a tall, a wide and a square matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.tall = nn.Linear(8, 18)
        self.wide = nn.Linear(18, 8)
        self.square = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 30, bias=False)


def twins() -> tuple[Layers, Layers]:
    mine, theirs = Layers(), Layers()
    theirs.load_state_dict(mine.state_dict())
    return mine.double(), theirs.double()


def run(mine: nn.Module, theirs: nn.Module, *optimizers, rates=None) -> None:
    """The same gradients to both models; ``rates`` sets the learning rate of all groups before each step."""
    for step in range(STEPS):
        for own, other in zip(mine.parameters(), theirs.parameters(), strict=True):
            own.grad = torch.randn_like(own)
            other.grad = own.grad.clone()
        for optimizer in optimizers:
            for group in optimizer.param_groups if rates else ():
                group["lr"] = rates[step]
            optimizer.step()


def assert_same(mine: nn.Module, theirs: nn.Module) -> None:
    for (name, own), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


class Formula(torch.optim.Optimizer):
    """An optimizer whose step is a function of a parameter, its state and its group."""

    def __init__(self, params, function, **defaults) -> None:
        super().__init__(params, defaults)
        self.function = function

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.copy_(self.function(parameter, parameter.grad, self.state[parameter], group))


# --- torch


def test_adamw_of_torch_keeps_every_setting():
    mine, theirs = twins()
    settings = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}
    run(mine, theirs, spectrim.AdamW(mine.parameters(), **settings), torch.optim.AdamW(theirs.parameters(), **settings))
    assert_same(mine, theirs)


MUON_OF_TORCH = {None: "original", "original": "original", "match_rms_adamw": "match_rms_adamw"}


@pytest.mark.parametrize("adjust", MUON_OF_TORCH)
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_of_torch_keeps_every_setting_and_both_scales(adjust, nesterov, monkeypatch):
    # What torch computes roughly in bfloat16, computed exactly; the rest is torch's own.
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", lambda grad, *_: oracle.polar(grad))
    mine, theirs = twins()
    settings = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    matrices = [f"{name}.weight" for name in ("tall", "wide", "square")]
    kinds = dict(theirs.named_parameters())
    torchs = torch.optim.Muon([kinds[name] for name in matrices], adjust_lr_fn=adjust, **settings)
    rest = [parameter for name, parameter in kinds.items() if name not in matrices and parameter.ndim == 2]
    vectors = [parameter for parameter in kinds.values() if parameter.ndim == 1]
    plain = torch.optim.AdamW([{"params": rest}, {"params": vectors, "weight_decay": 0.0}], lr=0.01, weight_decay=0.1)
    # One optimizer in place of two: their learning rates become a factor on that of the matrices.
    groups = spectrim.param_groups(
        mine, embedding_lr=0.5, head_lr=0.5, overrides={"*.bias": {"lr_factor": 0.5, "weight_decay": 0.0}}
    )
    run(mine, theirs, spectrim.Muon(groups, scale=MUON_OF_TORCH[adjust], precision="exact", **settings), torchs, plain)
    assert_same(mine, theirs)


def test_state_of_torchs_muon_loads():
    parameter = nn.Parameter(torch.randn(12, 8))
    twin = nn.Parameter(parameter.detach().clone())
    theirs, mine = torch.optim.Muon([twin], lr=0.02), spectrim.Muon([parameter], lr=0.02, scale="original")
    twin.grad = torch.randn(12, 8)
    theirs.step()
    mine.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(mine.state[parameter]["momentum_buffer"], theirs.state[twin]["momentum_buffer"])


# --- the authors' SPECTRA


def spectra_step(base, *, clip_c, apply_to, warmup_steps, base_lr):
    """(1 − ηλ)X − η √max(1, m/n) H_c(U) for the update U of a base optimizer; vectors within the norm c keep theirs."""

    def clipped(U: Tensor, c: float) -> Tensor:
        if U.ndim == 1:
            return U if U.norm() <= c else U / torch.sqrt(1 + (U.norm() / c) ** 2)
        return math.sqrt(max(1, U.shape[0] / U.shape[1])) * oracle.soft_clip(U, c)

    def step(X, G, state, group):
        state["step"] = state.get("step", 0) + 1
        U = base(G, state)
        # While the learning rate rises c falls with it.
        c = clip_c * base_lr / group["lr"] if state["step"] <= warmup_steps else clip_c
        if apply_to == "all" or X.ndim == 2:
            U = clipped(U, c)
        return (1 - group["lr"] * group["weight_decay"]) * X - group["lr"] * U

    return step


def adam(beta1: float, beta2: float):
    def update(G, state):
        state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * G
        state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * G**2
        m, v = state["m"] / (1 - beta1 ** state["step"]), state["v"] / (1 - beta2 ** state["step"])
        return m / (v.sqrt() + 1e-8)

    return update


def sign(momentum: float):
    def update(G, state):
        state["buffer"] = momentum * state.get("buffer", 0) + G
        return torch.sign(G + momentum * state["buffer"])

    return update


RATES = [2e-4, 4e-4, 6e-4, 8e-4, 1e-3, 1e-3]


@pytest.mark.parametrize("apply_to", ["2d", "all"])
@pytest.mark.parametrize("name", ["adamw", "signum"])
def test_settings_of_the_authors_spectra(name, apply_to):
    mine, theirs = twins()
    # Vectors here are all longer than c, where theirs and ours are one; below c theirs does nothing.
    schedule = {"clip_c": 0.5, "warmup_steps": 4, "base_lr": 1e-3}
    base = adam(0.8, 0.999) if name == "adamw" else sign(0.95)
    decayed = [
        p for key, p in theirs.named_parameters() if p.ndim == 2 and key.split(".")[0] not in ("embed", "lm_head")
    ]
    others = [p for p in theirs.parameters() if all(p is not found for found in decayed)]
    reference = Formula(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        spectra_step(base, apply_to=apply_to, **schedule),
        lr=1e-3,
        weight_decay=0.1,
    )
    undecayed = {"embed.weight": {"weight_decay": 0.0}, "lm_head.weight": {"weight_decay": 0.0}}
    vectors = {"*.bias": {"clip": None}} if apply_to == "2d" else {}
    own = {"betas": (0.8, 0.999)} if name == "adamw" else {"momentum": 0.95, "nesterov": True}
    optimizer = spectrim.create(
        f"{name}+clip",
        mine,
        lr=1e-3,
        clip=0.5,
        warmup_steps=4,
        peak_lr=1e-3,
        weight_decay=0.1,
        precision="exact",
        overrides=undecayed | vectors,
        **own,
    )
    run(mine, theirs, optimizer, reference, rates=RATES)
    assert_same(mine, theirs)


def test_decays_of_the_threshold_are_those_of_the_authors():
    """Their names, and the share of c that is left: r + (1 − r) f(p), p the progress of the last part of training."""
    names = {"linear": "linear", "sqrt": "sqrt", "cosine": "cosine", "exp": "exponential", "square": "square"}
    total, fraction, final = 40, 0.25, 0.2
    for theirs, mine in names.items():
        optimizer = spectrim.AdamW(
            [nn.Parameter(torch.zeros(4, 4))],
            lr=1e-3,
            clip=8.0,
            clip_decay=mine,
            total_steps=total,
            clip_decay_fraction=fraction,
            clip_final=final,
        )
        for step in range(total + 1):
            p = min(max((step - 30) / 10, 0), 1)
            left = {
                "linear": final + (1 - final) * (1 - p),
                "sqrt": final + (1 - final) * (1 - math.sqrt(p)),
                "cosine": final + (1 - final) * (1 + math.cos(math.pi * p)) / 2,
                "exp": final**p,
                "square": final + (1 - final) * (1 - p**2),
            }[theirs]
            optimizer.param_groups[0]["steps_taken"] = step
            (row,) = spectrim.describe(optimizer).rows
            assert row.threshold == pytest.approx(8 * left), (theirs, step)


def test_pre_clipping_as_the_authors_order_it():
    """Spectral clipping of 2-D gradients, then the global norm, then the optimizer."""
    mine, theirs = twins()
    settings = {"lr": 1e-3, "weight_decay": 0.1}
    own, other = spectrim.AdamW(mine.parameters(), **settings), torch.optim.AdamW(theirs.parameters(), **settings)
    for _ in range(STEPS):
        for one, two in zip(mine.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            two.grad = oracle.soft_clip(one.grad, 0.1) if one.ndim == 2 else one.grad.clone()
        spectrim.clip_grad_spectral_(mine.parameters(), 0.1)
        for model in (mine, theirs):
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        own.step()
        other.step()
    for one, two in zip(mine.parameters(), theirs.parameters(), strict=True):
        # Clipping is exact to 1e-3 here, and Adam's first steps enlarge that.
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


# --- dion


def dion_muon(*, mu, nesterov, adjust_lr):
    """M ← μM + G;  X ← (1 − ηλ)X − η a polar(M), or of G + μM with Nesterov; a as ``adjust_lr`` says."""

    def step(X, G, state, group):
        m, n = X.shape
        state["M"] = mu * state.get("M", 0) + G
        U = oracle.polar(G + mu * state["M"] if nesterov else state["M"])
        scale = {"spectral_norm": math.sqrt(m / n), "rms_norm": 0.2 * math.sqrt(max(m, n)), None: 1.0}[adjust_lr]
        return (1 - group["lr"] * group["weight_decay"]) * X - group["lr"] * scale * U

    return step


@pytest.mark.parametrize("adjust_lr", ["spectral_norm", "rms_norm", None])
@pytest.mark.parametrize("nesterov", [True, False])
def test_settings_of_dions_muon(adjust_lr, nesterov):
    mine, theirs = (
        nn.ModuleDict({f"{m}x{n}": nn.Linear(n, m, bias=False) for m, n in SHAPES}).double() for _ in range(2)
    )
    theirs.load_state_dict(mine.state_dict())
    lr, decay = 0.02, 0.1
    reference = Formula(
        theirs.parameters(), dion_muon(mu=0.95, nesterov=nesterov, adjust_lr=adjust_lr), lr=lr, weight_decay=decay
    )
    overrides = {}
    if adjust_lr != "rms_norm":
        for name, parameter in mine.named_parameters():
            m, n = parameter.shape
            factor = math.sqrt(m / n) if adjust_lr == "spectral_norm" else 1.0
            factor /= math.sqrt(max(1, m / n))
            if factor != 1:
                overrides[name] = {"lr_factor": factor, "weight_decay": decay / factor}
    # A sum of gradients and an average of them have the same polar factor.
    optimizer = spectrim.Muon(
        spectrim.param_groups(mine, overrides=overrides),
        lr=lr,
        momentum=0.95,
        nesterov=nesterov,
        weight_decay=decay,
        scale="match_rms_adamw" if adjust_lr == "rms_norm" else "original",
        precision="exact",
    )
    run(mine, theirs, optimizer, reference)
    assert_same(mine, theirs)


def test_one_scale_of_muon_in_terms_of_the_other():
    """For one shape, the rate that moves a matrix as far; decay, which the rate multiplies, is divided by as much."""
    for m, n in SHAPES:
        ratio = math.sqrt(max(1, m / n)) / (0.2 * math.sqrt(max(m, n)))
        one = nn.Linear(n, m, bias=False).double()
        two = nn.Linear(n, m, bias=False).double()
        two.load_state_dict(one.state_dict())
        original = spectrim.Muon(one.parameters(), lr=0.02, weight_decay=0.1, scale="original")
        matched = spectrim.Muon(two.parameters(), lr=0.02 * ratio, weight_decay=0.1 / ratio, scale="match_rms_adamw")
        run(one, two, original, matched)
        assert_same(one, two)
