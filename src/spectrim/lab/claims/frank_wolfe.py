"""SPECTRA's theory: a clipped step with weight decay is a step of composite Frank-Wolfe (arXiv 2603.14315).

With learning rate η, decay λ, scale s, threshold c: D = s c/λ, b = λ/s, γ = λη. The claim is that

    X − ηλX − ηs clip_c(U)  =  (1 − γ)X + γS,   S = argmin over ‖S‖₂ ≤ D of ⟨U, S⟩ + (b/2)‖S‖_F².

The minimum is computed by a solver that knows nothing of singular value clipping.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from spectrim.lab.claims.claim import Finding
from spectrim.optim import AdamW, Momentum, Signum

__all__ = ["bounded_weights", "clipped_sgd_step", "clipped_sign_step", "minimise_in_ball"]

TOLERANCE = 1e-3
"""Largest relative distance between two computations of one step that counts as agreement."""

LR, DECAY, THRESHOLD = 0.1, 0.5, 1.3
SHAPE, DRAWS = (4, 3), 4
SCALE = (SHAPE[0] / SHAPE[1]) ** 0.5
RADIUS, CURVATURE = SCALE * THRESHOLD / DECAY, DECAY / SCALE


def minimise_in_ball(direction: Tensor, radius: float, curvature: float) -> Tensor:
    """The S of spectral norm at most ``radius`` that minimises ⟨direction, S⟩ + (curvature/2)‖S‖_F², in float64.

    An interior-point method: Newton steps on the objective minus μ log det(radius² I − SᵀS), for falling μ. The
    objective is within n μ of its minimum in the end, for n columns.
    """
    from scipy.optimize import minimize

    given = direction.double()
    inside = radius**2 * torch.eye(given.shape[1], dtype=torch.float64)
    size = float(given.norm()) * radius
    point = torch.zeros(given.numel(), dtype=torch.float64)
    for exponent in range(0, 14, 2):
        barrier = size * 10.0**-exponent

        def objective(flat: Tensor, barrier: float = barrier) -> Tensor:
            S = flat.view_as(given)
            factor, failed = torch.linalg.cholesky_ex(inside - S.T @ S)
            if failed.item():
                return flat.new_tensor(torch.inf) + 0 * flat.sum()  # outside the ball
            value: Tensor = (
                (given * S).sum() + curvature / 2 * S.square().sum() - 2 * barrier * factor.diagonal().log().sum()
            )
            return value

        solved = minimize(
            lambda x, f=objective: float(f(torch.from_numpy(x))),
            point.numpy(),
            method="trust-exact",
            jac=lambda x, f=objective: torch.func.grad(f)(torch.from_numpy(x)).numpy(),
            hess=lambda x, f=objective: torch.func.hessian(f)(torch.from_numpy(x)).numpy(),
            options={"gtol": 1e-12 * size, "maxiter": 200, "initial_trust_radius": 1e-2 * radius},
        )
        point = torch.from_numpy(solved.x)
    return point.view_as(given)


def clipped_sgd_step() -> Finding:
    """One hard-clipped SGD step of the library against the solver's Frank-Wolfe step."""
    errors, clipped = [], []
    for seed in range(DRAWS):
        X, G = start(seed)
        after = library_step(Momentum, X, G, momentum=0.0)
        best = minimise_in_ball(G, RADIUS, CURVATURE)
        expected = (1 - DECAY * LR) * X + DECAY * LR * best
        errors.append(distance(after, expected, X))
        clipped.append(float((torch.linalg.svdvals(G) > THRESHOLD).double().mean()))
    return Finding(
        verdict="holds" if max(errors) <= TOLERANCE and min(clipped) > 0 else "does not hold",
        measured=f"Largest relative distance between the two steps in {DRAWS} random matrices: {max(errors):.1e}; "
        f"{100 * sum(clipped) / len(clipped):.0f} % of the singular values were clipped.",
        figures={"largest_error": max(errors), "share_clipped": sum(clipped) / len(clipped)},
    )


def clipped_sign_step() -> Finding:
    """Sign steps against Frank-Wolfe steps: unclipped on the entry-wise ball, clipped on the spectral one."""
    unclipped, clipped, attained = [], [], []
    for seed in range(DRAWS):
        X, G = start(seed)
        sign = G.sign()
        plain = library_step(Signum, X, G, momentum=0.0, nesterov=False, clip=None)
        unclipped.append(distance(plain, (1 - DECAY * LR) * X + DECAY * LR * linear_minimum(G), X))
        after = library_step(Signum, X, G, momentum=0.0, nesterov=False)
        best = minimise_in_ball(sign, RADIUS, CURVATURE)
        clipped.append(distance(after, (1 - DECAY * LR) * X + DECAY * LR * best, X))
        attained.append(share_of_best_decrease(G, sign))
    error = max(*unclipped, *clipped)
    return Finding(
        verdict="holds" if error <= TOLERANCE else "does not hold",
        measured=f"Largest relative distance in {DRAWS} matrices: {max(unclipped):.1e} without clipping, from "
        f"the solution of the linear program; {max(clipped):.1e} with it, from the solver's point for the direction "
        f"sign(M). As a minimum of ⟨M, S⟩ over both balls, the clipped step attains {100 * min(attained):.0f} to "
        f"{100 * max(attained):.0f} % of the best decrease.",
        figures={"unclipped_error": max(unclipped), "clipped_error": max(clipped), "attained": attained},
        caveat="Holds for the direction sign(M). The paper's form of the l-infinity term was not available to us.",
    )


def bounded_weights() -> Finding:
    """The largest spectral norm of weights over runs of clipped optimizers, against D = s c/λ."""
    largest = {}
    for kind, options in ((Momentum, {}), (Signum, {}), (AdamW, {}), (AdamW, {"clip_form": "soft"})):
        for start_share in (0.1, 1.0):
            key = f"{kind.__name__} {options.get('clip_form', 'hard')}, from {start_share:g} D"
            largest[key] = largest_norm(kind, start_share, options)
    outside = {name: reached for name, reached in largest.items() if reached > 1 + 1e-5}
    return Finding(
        verdict="does not hold" if outside else "holds",
        measured=f"Largest spectral norm in 300 steps of noisy regression, over D: {max(largest.values()):.5f}, from "
        f"{len(largest)} runs of Momentum, Signum and AdamW that began at 0.1 D and at D.",
        figures=largest,
    )


def start(seed: int) -> tuple[Tensor, Tensor]:
    """A weight and a gradient, about half of whose singular values are above the threshold."""
    generator = torch.Generator().manual_seed(seed)
    X, G = torch.randn(2, *SHAPE, dtype=torch.float64, generator=generator)
    return X, G * (THRESHOLD / torch.linalg.svdvals(G)[:2].mean())


def library_step(kind: type, X: Tensor, G: Tensor, **options: object) -> Tensor:
    """The weight after one step of :func:`optimizer_of`."""
    parameter = torch.nn.Parameter(X.clone())
    parameter.grad = G.clone()
    optimizer_of(kind, parameter, **options).step()
    return parameter.detach()


def optimizer_of(kind: type, parameter: Tensor, **options: object) -> torch.optim.Optimizer:
    """An optimizer of the library over one matrix, hard-clipped unless ``options`` say otherwise."""
    settings = {"lr": LR, "weight_decay": DECAY, "clip": THRESHOLD, "clip_form": "hard"} | options
    if settings["clip"] is None:
        settings.pop("clip_form")
    optimizer: torch.optim.Optimizer = kind([{"params": [parameter], "role": "matrix"}], **settings)
    return optimizer


def distance(one: Tensor, other: Tensor, before: Tensor) -> float:
    """The distance between two results of a step, over the length of the step."""
    return float((one - other).norm() / (other - before).norm())


def linear_minimum(G: Tensor) -> Tensor:
    """The S with entries of size at most 1/λ that minimises ⟨G, S⟩, by linear programming."""
    from scipy.optimize import linprog

    solved = linprog(G.numpy().ravel(), bounds=[(-1 / DECAY, 1 / DECAY)] * G.numel())
    return torch.from_numpy(solved.x.reshape(G.shape))


def share_of_best_decrease(G: Tensor, sign: Tensor) -> float:
    """⟨G, S⟩ of the clipped sign step over its minimum in the intersection of both balls.

    Dykstra's algorithm projects ever longer steps along −G onto the intersection, which approaches the minimum.
    """
    U, sigma, V = torch.linalg.svd(sign, full_matrices=False)
    taken = -SCALE / DECAY * (U * sigma.clamp(max=THRESHOLD)) @ V
    edge = SCALE / DECAY
    best = 0.0
    for length in (10.0, 100.0, 1000.0):
        point = -length * G
        corrections = [torch.zeros_like(G), torch.zeros_like(G)]
        for _ in range(3000):
            moved = point + corrections[0]
            U, sigma, V = torch.linalg.svd(moved, full_matrices=False)
            point = (U * sigma.clamp(max=RADIUS)) @ V
            corrections[0] = moved - point
            moved = point + corrections[1]
            point = moved.clamp(-edge, edge)
            corrections[1] = moved - point
        best = min(best, float((G * point).sum()))
    return float((G * taken).sum()) / best


def largest_norm(kind: type, start_share: float, options: Mapping[str, object]) -> float:
    """The largest ‖X‖₂/D over 300 steps of a regression whose gradients carry heavy-tailed noise."""
    generator = torch.Generator().manual_seed(7)
    X = torch.randn(24, 16, dtype=torch.float64, generator=generator)
    scale = (24 / 16) ** 0.5
    radius = scale * THRESHOLD / DECAY
    parameter = torch.nn.Parameter(X * (start_share * radius / torch.linalg.matrix_norm(X, 2)))
    target = 10 * torch.randn(24, 16, dtype=torch.float64, generator=generator)
    optimizer = optimizer_of(kind, parameter, **options)
    largest = 0.0
    for _ in range(300):
        noise = torch.randn(24, 16, dtype=torch.float64, generator=generator)
        noise /= torch.randn(24, 16, dtype=torch.float64, generator=generator).abs().clamp(min=1e-3)
        parameter.grad = parameter.detach() - target + noise
        optimizer.step()
        largest = max(largest, float(torch.linalg.matrix_norm(parameter.detach(), 2)) / radius)
    return largest
