"""The named optimizers: each a recipe, its options, and a page that says what it does and when to use it."""

from __future__ import annotations

from typing import Any, Literal, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from spectrim.optim.directions import ADAM, AVERAGE, MOMENTUM
from spectrim.optim.optimizer import SpectralOptimizer
from spectrim.optim.options import SpectralOptions
from spectrim.optim.recipe import Recipe

__all__ = ["AdamW", "Muon", "Spectra"]

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
        options: see :class:`~spectrim.optim.options.SpectralOptions`. ``clip_scope`` is "all": embeddings and heads are
            clipped as matrices, vectors by their norm.

    When to use it: with ``clip="auto"`` wherever AdamW is used now, at about its learning rate or somewhat above.

    Source: arXiv 2603.14315 (clip, pre_clip), arXiv 2605.27733 (shrink).
    """

    recipe = Recipe(direction=ADAM)

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
        options: see :class:`~spectrim.optim.options.SpectralOptions`.

    When to use it: where optimizer state or optimizer time is what hurts.

    Source: arXiv 2602.11185.
    """

    recipe = Recipe(direction=MOMENTUM, operator="shape_spike")

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
        shrink: factor on the gradient's entry scale above which entries are shrunk, before momentum.
        betas, eps: of the plain AdamW.
        options: see :class:`~spectrim.optim.options.SpectralOptions`.

    When to use it: as the comparison to beat, or with ``shrink`` where its optimizer time does not matter.

    Source: Jordan et al. 2024 for Muon, arXiv 2502.16982 for the matched scale, arXiv 2605.27733 for shrinkage
        before it.
    """

    recipe = Recipe(direction=AVERAGE, operator="orthogonalize")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        *,
        scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
        shrink: Threshold = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **options: Unpack[SpectralOptions],
    ) -> None:
        own: dict[str, Any] = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        own |= {"betas": betas, "eps": eps, "scale": scale, "shrink": shrink}
        super().__init__(params, own, options)
