"""The named optimizers."""

from __future__ import annotations

from typing import Any, Literal, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from spectrim.optim import directions
from spectrim.optim.grouping.options import SpectralOptions
from spectrim.optim.optimizer import SpectralOptimizer
from spectrim.optim.rules.rule import Recipe
from spectrim.optim.spectral.orthogonalize import Orthogonalize
from spectrim.optim.spectral.spike import ShapeSpike

__all__ = ["MARS", "AdEMAMix", "AdamW", "Momentum", "Muon", "Signum", "Spectra"]

Threshold = float | Literal["auto"] | None


class AdamW(SpectralOptimizer):
    r"""AdamW with optional spectral clipping of the update, and shrinking or clipping of the gradient.

        G ← shrink(G);  G ← H_cpre(G)                                   with shrink and pre_clip
        m ← β₁m + (1−β₁)G;  v ← β₂v + (1−β₂)G²;  U = m̂ / (√v̂ + ε)
        X ← (1 − ηλ)X − η √max(1, p/q) H_c(U)      H_c(U) = Σ σ/√(1+σ²/c²) uvᵀ, for X of p outputs and q inputs

    Without ``clip``, ``pre_clip`` and ``shrink`` it is torch.optim.AdamW, by torch's fused kernel.

    Args:
        params: parameters, named parameters, or groups from :func:`spectrim.param_groups`.
        lr: learning rate η.
        betas, eps, weight_decay: as in torch.optim.AdamW.
        clip: threshold c of the update's singular values; "auto" is 0.01 divided by the group's peak learning rate.
        pre_clip: threshold of the gradient's singular values; its authors advise against using it with ``clip``.
        shrink: entries beyond this factor times the gradient's entry scale are shrunk; "auto" for the default factor.
        options: see :class:`.SpectralOptions`. ``clip_scope`` is "all": embeddings and heads are clipped as matrices,
            vectors by their norm.

    When to use it: with ``clip="auto"`` in place of AdamW, at AdamW's learning rate or a somewhat higher one.

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
    r"""The sign of momentum with optional spectral clipping: half of AdamW's state.

        B ← μB + G;   U = sign(G + μB) with Nesterov, sign(B) without
        X ← (1 − ηλ)X − η √max(1, p/q) H_c(U)

    Args:
        params: parameters, named parameters, or groups from :func:`spectrim.param_groups`.
        lr: learning rate η; about a third of AdamW's, since every entry moves by η.
        momentum: μ; momentum is a sum that starts at zero.
        nesterov: use Nesterov momentum, as the source does.
        weight_decay: decoupled decay λ.
        clip, pre_clip, shrink: as for :class:`AdamW`. Clipping matters most here, since a sign matrix has singular
            values up to √(pq).
        options: see :class:`.SpectralOptions`. ``clip_scope`` is "all".
        betas, eps: for the plain AdamW of embeddings, heads and vectors with ``clip_scope="matrices"``.

    When to use it: with ``clip="auto"`` if memory allows only one state tensor per parameter.

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
    r"""AdamW with a second, slow average of gradients, and optional spectral clipping of the update.

        m₁ ← β₁m₁ + (1−β₁)G;  m₂ ← β₃(t) m₂ + (1−β₃(t))G;  v ← β₂v + (1−β₂)G²
        U = (m̂₁ + a(t) m₂) / (√v̂ + ε);   X ← (1 − ηλ)X − η √max(1, p/q) H_c(U)

    a(t) and the half-life of β₃(t) grow linearly over the first T_w steps.

    Args:
        params: parameters, named parameters, or groups from :func:`spectrim.param_groups`.
        lr: learning rate η.
        betas: β₁, β₂, β₃.
        alpha: a, the weight of the slow average.
        eps, weight_decay: as for :class:`AdamW`.
        slow_warmup_steps: T_w; None uses ``total_steps``, and no warm-up if that is None too.
        clip, pre_clip, shrink: as for :class:`AdamW`.
        options: see :class:`.SpectralOptions`. ``clip_scope`` is "all"; with "matrices", embeddings, heads and vectors
            get plain AdamW with β₁ and β₂.

    When to use it: on long runs, in which the slow average has time to help.

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


class MARS(SpectralOptimizer):
    r"""AdamW on gradients of reduced variance, with optional spectral clipping of the update.

        C ← G + γ β₁/(1−β₁) (G − G₋);  C ← C / max(1, ‖C‖);  G₋ ← G              G₋ starts at zero
        m ← β₁m + (1−β₁)C;  v ← β₂v + (1−β₂)C²;  U = m̂ / (√v̂ + ε);   X ← (1 − ηλ)X − η √max(1, p/q) H_c(U)

    G₋ is the gradient of the step before, after ``shrink`` and ``pre_clip``: this is the approximate form of
    MARS-AdamW, which needs one gradient a step. ‖C‖ is the Frobenius norm of a logical matrix. Vectors get plain
    AdamW, clipped by their norm.

    Args:
        params: parameters, named parameters, or groups from :func:`spectrim.param_groups`.
        lr: learning rate η; for vectors the authors take a third of it, by ``overrides`` with ``lr_factor``.
        betas: β₁, β₂.
        gamma: γ, the share of the correction; 0 for AdamW on gradients of norm at most 1.
        eps, weight_decay: as for :class:`AdamW`.
        adamw_betas: betas of vectors, and with ``clip_scope="matrices"`` also of embeddings and heads.
        clip, pre_clip, shrink: as for :class:`AdamW`.
        options: see :class:`.SpectralOptions`. ``clip_scope`` is "all"; with "matrices", embeddings, heads and vectors
            get plain AdamW.

    When to use it: if gradients are noisy and memory allows three state tensors per parameter.

    Source: arXiv 2411.10438 for MARS, arXiv 2603.14315 for clipping.
    """

    recipe = Recipe(direction=directions.MARS, vectors=directions.Adam)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        gamma: float = 0.025,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        clip: Threshold = None,
        pre_clip: float | None = None,
        shrink: Threshold = None,
        **options: Unpack[SpectralOptions],
    ) -> None:
        own: dict[str, Any] = {"lr": lr, "betas": betas, "gamma": gamma, "eps": eps, "weight_decay": weight_decay}
        own |= {"adamw_betas": adamw_betas, "clip_scope": "all"}
        super().__init__(params, {**own, "clip": clip, "pre_clip": pre_clip, "shrink": shrink}, options)


class Momentum(SpectralOptimizer):
    r"""Momentum SGD with decoupled decay and optional spectral clipping of the update.

        B ← μB + G;   U = G + μB with Nesterov, B without;   X ← (1 − ηλ)X − η √max(1, p/q) H_c(U)

    Args:
        params: parameters, named parameters, or groups from :func:`spectrim.param_groups`.
        lr: learning rate η.
        momentum: μ; momentum is a sum that starts at zero.
        nesterov: use Nesterov momentum.
        weight_decay: decoupled decay λ.
        clip, pre_clip, shrink: as for :class:`AdamW`, but thresholds are in the unit of gradients, which are small.
        options: see :class:`.SpectralOptions`. ``clip_scope`` is "all".
        betas, eps: for the plain AdamW of embeddings, heads and vectors with ``clip_scope="matrices"``.

    When to use it: in place of SGD. With ``clip`` it is the simplest form of the source's Frank-Wolfe step.

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
    r"""Momentum with its largest singular values (the spike) reduced to the scale of the others (the tail).

    It keeps half of AdamW's state and needs a fraction of Muon's operations.

        M ← μM + G;  U ← orth(M V);  W ← MᵀU;  V ← W / its column norms         rank k = round(r · min(m, n))
        O = M − U Wᵀ + σ_tail U Vᵀ;   X ← (1 − ηλ)X − 0.2 η O / RMS(O)

    Embeddings, heads and vectors get plain AdamW at their group's learning rate.

    Args:
        params: parameters, named parameters, or groups from :func:`spectrim.param_groups`.
        lr: learning rate η, as large as for AdamW.
        momentum: μ; momentum is a sum here, not an average.
        rank_ratio: r, the share of singular values that form the spike.
        weight_decay: decoupled decay λ.
        clip: threshold on the singular values of the scaled direction, in AdamW's unit.
        shrink: entries beyond this factor times the gradient's entry scale are shrunk.
        power_steps: power steps of the spike's basis in every step; the first step takes at least four.
        betas, eps: for the plain AdamW.
        options: see :class:`.SpectralOptions`.

    When to use it: if optimizer memory or time is the bottleneck.

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
        power_steps: int = 1,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **options: Unpack[SpectralOptions],
    ) -> None:
        own: dict[str, Any] = {"lr": lr, "momentum": momentum, "nesterov": False, "rank_ratio": rank_ratio}
        own |= {
            "power_steps": power_steps,
            "weight_decay": weight_decay,
            "betas": betas,
            "eps": eps,
            "scale": "rms",
            "clip": clip,
            "shrink": shrink,
        }
        super().__init__(params, own, options)


class Muon(SpectralOptimizer):
    r"""Momentum with every singular value set to one: the baseline for spectral methods.

        M ← βM + (1−β)G;  U = polar(G + β(M − G)) with Nesterov, polar(M) without
        X ← (1 − ηλ)X − η · scale · U

    Embeddings, heads and vectors get plain AdamW at their group's learning rate.

    Args:
        params: parameters, named parameters, or groups from :func:`spectrim.param_groups`.
        lr: learning rate η.
        momentum: β; momentum is an average.
        nesterov: use Nesterov momentum.
        weight_decay: decoupled decay λ.
        scale: "match_rms_adamw", 0.2 √max(m, n), for AdamW's learning rates; "original" is √max(1, m/n).
        orthogonalize_steps: None orthogonalises accurately; a number takes that many steps of Muon's iteration. The
            original takes 5, which is less accurate and, on a CPU, several times faster.
        shrink: entries beyond this factor times the gradient's entry scale are shrunk, before momentum.
        betas, eps: for the plain AdamW.
        options: see :class:`.SpectralOptions`.

    When to use it: as the baseline to compare with, or with ``shrink`` if optimizer time does not matter.

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
        own |= {"betas": betas, "eps": eps, "scale": scale, "shrink": shrink}
        super().__init__(params, {**own, "orthogonalize_steps": orthogonalize_steps}, options)
