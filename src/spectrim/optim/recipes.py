"""The named optimizers: each a recipe, its options, and a page that says what it does and when to use it."""

from __future__ import annotations

from typing import Any, Literal, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from spectrim.optim import directions
from spectrim.optim.grouping.options import SpectralOptions
from spectrim.optim.optimizer import SpectralOptimizer
from spectrim.optim.rules.recipe import Recipe
from spectrim.optim.spectral.orthogonalize import Orthogonalize
from spectrim.optim.spectral.spike import ShapeSpike

__all__ = ["AdEMAMix", "AdamW", "Momentum", "Muon", "Signum", "Spectra"]

Threshold = float | Literal["auto"] | None


class AdamW(SpectralOptimizer):
    r"""AdamW whose update may be clipped spectrally, and whose gradient may be shrunk or clipped before.

        G ← shrink(G);  G ← H_cpre(G)                                   where asked for
        m ← β₁m + (1−β₁)G;  v ← β₂v + (1−β₂)G²;  U = m̂ / (√v̂ + ε)
        X ← (1 − ηλ)X − η √max(1, p/q) H_c(U)      H_c(U) = Σ σ/√(1+σ²/c²) uvᵀ, for X of p outputs and q inputs

    With ``clip``, ``pre_clip`` and ``shrink`` off it is torch.optim.AdamW, by torch's fused kernel.

    Args:
        params: parameters, named parameters, or groups from :func:`spectrim.param_groups`.
        lr: learning rate η.
        betas, eps, weight_decay: as in torch.optim.AdamW.
        clip: threshold c of the update's singular values; "auto" is 0.01 over the group's peak learning rate.
        pre_clip: threshold of the gradient's singular values; its authors advise against using both.
        shrink: factor on the gradient's entry scale above which entries are shrunk; "auto" for the default factor.
        options: see :class:`.SpectralOptions`. ``clip_scope`` is "all": embeddings and heads are
            clipped as matrices, vectors by their norm.

    When to use it: with ``clip="auto"`` wherever AdamW is used now, at about its learning rate or somewhat above.

    Source: arXiv 2603.14315 (clip, pre_clip), arXiv 2605.27733 (shrink).
    """

    recipe = Recipe(direction=directions.Adam)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        clip: Threshold = None,
        pre_clip: float | None = None,
        shrink: Threshold = None,
        **options: Unpack[SpectralOptions],
    ) -> None:
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "clip_scope": "all"}
        super().__init__(params, {**own, "clip": clip, "pre_clip": pre_clip, "shrink": shrink}, options)


class Signum(SpectralOptimizer):
    r"""The sign of momentum, whose update may be clipped spectrally: AdamW's step with half of its state.

        B ← μB + G;   U = sign(G + μB) with Nesterov, sign(B) without
        X ← (1 − ηλ)X − η √max(1, p/q) H_c(U)

    Args:
        params: parameters, named parameters, or groups from :func:`spectrim.param_groups`.
        lr: learning rate η; about a third of AdamW's, since every entry moves by all of it.
        momentum: μ; momentum is a sum from zero.
        nesterov: look one step ahead, as the source does.
        weight_decay: decoupled decay λ.
        clip, pre_clip, shrink: as for :class:`AdamW`. A sign matrix has singular values up to √(pq), so clipping
            matters
            most here.
        options: see :class:`.SpectralOptions`. ``clip_scope`` is "all".
        betas, eps: of the plain AdamW that embeddings, heads and vectors get with ``clip_scope="matrices"``.

    When to use it: with ``clip="auto"`` where memory allows one state tensor but AdamW's quality is wanted.

    Source: arXiv 1802.04434 for Signum, arXiv 2603.14315 for clipping it.
    """

    recipe = Recipe(direction=directions.Sign)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-4,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        *,
        clip: Threshold = None,
        pre_clip: float | None = None,
        shrink: Threshold = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **options: Unpack[SpectralOptions],
    ) -> None:
        own: dict[str, Any] = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        own |= {"betas": betas, "eps": eps, "clip_scope": "all", "clip": clip, "pre_clip": pre_clip, "shrink": shrink}
        super().__init__(params, own, options)


class AdEMAMix(SpectralOptimizer):
    r"""AdamW with a second, slow average of gradients, whose update may be clipped spectrally.

        m₁ ← β₁m₁ + (1−β₁)G;  m₂ ← β₃(t) m₂ + (1−β₃(t))G;  v ← β₂v + (1−β₂)G²
        U = (m̂₁ + a(t) m₂) / (√v̂ + ε);   X ← (1 − ηλ)X − η √max(1, p/q) H_c(U)

    a(t) and the half-life of β₃(t) grow linearly over the first T_w steps.

    Args:
        params: parameters, named parameters, or groups from :func:`spectrim.param_groups`.
        lr: learning rate η.
        betas: β₁, β₂, β₃.
        alpha: a, the weight of the slow average.
        eps, weight_decay: as for :class:`AdamW`.
        slow_warmup_steps: T_w; ``total_steps`` unless given, and no warm-up where neither is.
        clip, pre_clip, shrink: as for :class:`AdamW`.
        options: see :class:`.SpectralOptions`. ``clip_scope`` is "all"; with "matrices",
            embeddings,
            heads and vectors get plain AdamW with β₁ and β₂.

    When to use it: on long runs, where the slow average has time to pay for its memory.

    Source: arXiv 2409.03137 for AdEMAMix, arXiv 2603.14315 for clipping it.
    """

    recipe = Recipe(direction=directions.AdEMAMix)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 8.0,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        slow_warmup_steps: int | None = None,
        clip: Threshold = None,
        pre_clip: float | None = None,
        shrink: Threshold = None,
        **options: Unpack[SpectralOptions],
    ) -> None:
        own: dict[str, Any] = {"lr": lr, "betas": betas, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        own |= {"slow_warmup_steps": slow_warmup_steps, "clip_scope": "all"}
        super().__init__(params, {**own, "clip": clip, "pre_clip": pre_clip, "shrink": shrink}, options)


class Momentum(SpectralOptimizer):
    r"""Momentum SGD with decoupled decay, whose update may be clipped spectrally.

        B ← μB + G;   U = G + μB with Nesterov, B without;   X ← (1 − ηλ)X − η √max(1, p/q) H_c(U)

    Args:
        params: parameters, named parameters, or groups from :func:`spectrim.param_groups`.
        lr: learning rate η.
        momentum: μ; momentum is a sum from zero.
        nesterov: look one step ahead.
        weight_decay: decoupled decay λ.
        clip, pre_clip, shrink: as for :class:`AdamW`. Gradients are small: a threshold on their sum is in their unit.
        options: see :class:`.SpectralOptions`. ``clip_scope`` is "all".
        betas, eps: of the plain AdamW that embeddings, heads and vectors get with ``clip_scope="matrices"``.

    When to use it: where SGD is used today, and with ``clip`` as the plainest form of the Frank-Wolfe step of the
        source.

    Source: arXiv 2603.14315.
    """

    recipe = Recipe(direction=directions.Momentum)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.95,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        *,
        clip: Threshold = None,
        pre_clip: float | None = None,
        shrink: Threshold = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **options: Unpack[SpectralOptions],
    ) -> None:
        own: dict[str, Any] = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        own |= {"betas": betas, "eps": eps, "clip_scope": "all", "clip": clip, "pre_clip": pre_clip, "shrink": shrink}
        super().__init__(params, own, options)


class Spectra(SpectralOptimizer):
    r"""Momentum whose spike is shrunk to its tail's scale: half of AdamW's state and a fraction of Muon's work.

        M ← μM + G;  U ← orth(M V);  W ← MᵀU;  V ← W / its column norms         rank k = round(r · min(m, n))
        O = M − U Wᵀ + σ_tail U Vᵀ;   X ← (1 − ηλ)X − 0.2 η O / RMS(O)

    Embeddings, heads and vectors get plain AdamW at their group's learning rate.

    Args:
        params: parameters, named parameters, or groups from :func:`spectrim.param_groups`.
        lr: learning rate η, of the size that AdamW takes.
        momentum: μ; momentum is a sum here, not an average.
        rank_ratio: r, the share of directions that is taken for the spike.
        weight_decay: decoupled decay λ.
        clip: threshold on the singular values of the final direction, after its scaling, in AdamW's unit.
        shrink: factor on the gradient's entry scale above which entries are shrunk.
        betas, eps: of the plain AdamW.
        options: see :class:`.SpectralOptions`.

    When to use it: where optimizer state or optimizer time is what hurts.

    Source: arXiv 2602.11185.
    """

    recipe = Recipe(direction=directions.Momentum, operator=ShapeSpike)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        rank_ratio: float = 0.015,
        weight_decay: float = 0.1,
        *,
        clip: Threshold = None,
        shrink: Threshold = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **options: Unpack[SpectralOptions],
    ) -> None:
        own: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": False,
            "rank_ratio": rank_ratio,
            "weight_decay": weight_decay,
        }
        own |= {"betas": betas, "eps": eps, "scale": "rms", "clip": clip, "shrink": shrink}
        super().__init__(params, own, options)


class Muon(SpectralOptimizer):
    r"""Momentum with every singular value set to one, the baseline of spectral methods.

        M ← βM + (1−β)G;  U = polar(G + β(M − G)) with Nesterov, polar(M) without
        X ← (1 − ηλ)X − η · scale · U

    Embeddings, heads and vectors get plain AdamW at their group's learning rate.

    Args:
        params: parameters, named parameters, or groups from :func:`spectrim.param_groups`.
        lr: learning rate η.
        momentum: β; momentum is an average.
        nesterov: look one step ahead.
        weight_decay: decoupled decay λ.
        scale: "match_rms_adamw", 0.2 √max(m, n), takes AdamW's learning rates; "original" is √max(1, m/n).
        orthogonalize_steps: None orthogonalises accurately; a number only as far as so many steps of Muon's iteration
            would, 5 in the original, which on a CPU is several times faster.
        shrink: factor on the gradient's entry scale above which entries are shrunk, before momentum.
        betas, eps: of the plain AdamW.
        options: see :class:`.SpectralOptions`.

    When to use it: as the comparison to beat, or with ``shrink`` where its optimizer time does not matter.

    Source: Jordan et al. 2024 for Muon, arXiv 2502.16982 for the matched scale, arXiv 2605.27733 for shrinkage
        before it.
    """

    recipe = Recipe(direction=directions.Average, operator=Orthogonalize)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        *,
        scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
        orthogonalize_steps: int | None = None,
        shrink: Threshold = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **options: Unpack[SpectralOptions],
    ) -> None:
        own: dict[str, Any] = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        own |= {
            "betas": betas,
            "eps": eps,
            "scale": scale,
            "shrink": shrink,
            "orthogonalize_steps": orthogonalize_steps,
        }
        super().__init__(params, own, options)
