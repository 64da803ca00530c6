"""The optimizers in float64, one matrix or vector at a time, as close to methods' formulas as code can be.

No product code imports this. Each function is a whole run: it takes the weight and all gradients, and returns the
weight.
"""

import math

import torch
from torch import Tensor

import oracle


def clip_scale(X: Tensor) -> float:
    return math.sqrt(max(1.0, X.shape[0] / X.shape[1])) if X.ndim == 2 else 1.0


def hard_clip(U: Tensor, c: float) -> Tensor:
    if U.ndim < 2:
        return U * (c / U.norm()).clamp(max=1)
    return clip_scale(U) * oracle.hard_clip(U, c)


def clip(U: Tensor, c: float) -> Tensor:
    if U.ndim < 2:
        return U / torch.sqrt(1 + (U.norm() / c) ** 2)
    return clip_scale(U) * oracle.soft_clip(U, c)


def shrink(G: Tensor, factor: float) -> Tensor:
    tau = factor * G.abs().sqrt().mean() ** 2 / (math.sqrt(2) * math.gamma(0.75) ** 2 / math.pi)
    return G / (1 + (G / tau) ** 2)


def adamw(X, grads, *, lr, betas=(0.9, 0.999), eps=1e-8, decay=0.01, c=None, pre=None, factor=None):
    X, m, v = X.double(), 0.0, 0.0
    for step, raw in enumerate(grads, 1):
        G = raw.double()
        if factor is not None:
            G = shrink(G, factor)
        if pre is not None and G.ndim == 2:
            G = oracle.soft_clip(G, pre)
        m = betas[0] * m + (1 - betas[0]) * G
        v = betas[1] * v + (1 - betas[1]) * G**2
        U = (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
        X = (1 - lr * decay) * X - lr * (U if c is None else clip(U, c))
    return X


def muon(X, grads, *, lr, beta=0.95, nesterov=True, decay=0.1, scale="match_rms_adamw"):
    X, M = X.double(), 0.0
    for raw in grads:
        G = raw.double()
        M = beta * M + (1 - beta) * G
        U = oracle.polar(G + beta * (M - G) if nesterov else M)
        factor = 0.2 * math.sqrt(max(X.shape)) if scale == "match_rms_adamw" else clip_scale(X)
        X = (1 - lr * decay) * X - lr * factor * U
    return X


def spectra(X, grads, *, lr, start, mu=0.95, decay=0.1, first_steps=4, power_steps=1, c=None):
    """``start`` is the n x k basis before the first step."""
    X, M, V = X.double(), 0.0, start.double()
    for step, raw in enumerate(grads):
        M = mu * M + raw.double()
        for _ in range(max(first_steps, power_steps) if step == 0 else power_steps):
            U = torch.linalg.qr(M @ V).Q
            W = M.mT @ U
            V = W / W.norm(dim=0)
        shaped = oracle.shape_spike(M, U, V)
        update = 0.2 * math.sqrt(shaped.numel()) / shaped.norm() * shaped
        X = (1 - lr * decay) * X - lr * (update if c is None else clip(update, c))
    return X


def signum(X, grads, *, lr, mu=0.95, nesterov=True, decay=0.1, c=None):
    X, buffer = X.double(), 0.0
    for raw in grads:
        G = raw.double()
        buffer = mu * buffer + G
        U = torch.sign(G + mu * buffer if nesterov else buffer)
        X = (1 - lr * decay) * X - lr * (U if c is None else clip(U, c))
    return X


def momentum(X, grads, *, lr, mu=0.95, nesterov=False, decay=0.0, c=None):
    X, buffer = X.double(), 0.0
    for raw in grads:
        G = raw.double()
        buffer = mu * buffer + G
        U = G + mu * buffer if nesterov else buffer
        X = (1 - lr * decay) * X - lr * (U if c is None else clip(U, c))
    return X


def ademamix(X, grads, *, lr, betas=(0.9, 0.999, 0.9999), alpha=8.0, eps=1e-8, decay=0.01, warmup=None, c=None):
    def h(beta):
        return math.log(0.5) / math.log(beta) - 1

    X, m1, m2, v = X.double(), 0.0, 0.0, 0.0
    for step, raw in enumerate(grads, 1):
        G, x = raw.double(), 1.0 if warmup is None else min(step / warmup, 1.0)
        beta3 = 0.5 ** (1 / (1 + (1 - x) * h(betas[0]) + x * h(betas[2])))
        m1 = betas[0] * m1 + (1 - betas[0]) * G
        m2 = beta3 * m2 + (1 - beta3) * G
        v = betas[1] * v + (1 - betas[1]) * G**2
        root = (v / (1 - betas[1] ** step)).sqrt() + eps
        U = (m1 / (1 - betas[0] ** step) + alpha * x * m2) / root
        X = (1 - lr * decay) * X - lr * (U if c is None else clip(U, c))
    return X


def mars(X, grads, *, lr, betas=(0.95, 0.99), gamma=0.025, eps=1e-8, decay=0.01, c=None, pre=None):
    X, last, m, v = X.double(), 0.0, 0.0, 0.0
    for step, raw in enumerate(grads, 1):
        G = raw.double() if pre is None else oracle.soft_clip(raw.double(), pre)
        C = G + gamma * betas[0] / (1 - betas[0]) * (G - last)
        C = C / C.norm().clamp(min=1)
        last = G
        m = betas[0] * m + (1 - betas[0]) * C
        v = betas[1] * v + (1 - betas[1]) * C**2
        U = (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
        X = (1 - lr * decay) * X - lr * (U if c is None else clip(U, c))
    return X
