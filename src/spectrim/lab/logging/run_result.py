"""The result of one run, as ``result.json`` stores it."""

from spectrim.lab.logging.dynamics import Dynamics
from spectrim.lab.settings import Config

__all__ = ["Curve", "Plan", "RunResult"]


class Curve(Config):
    """Validation loss against tokens seen; a loss that was not finite is None."""

    tokens: tuple[int, ...]
    val_loss: tuple[float | None, ...]


class Plan(Config):
    """The table of :func:`spectrim.describe` at the peak learning rate."""

    summary: str
    rows: tuple[tuple[str, ...], ...]
    """The header first."""


class RunResult(Config):
    """The result of a finished run."""

    recipe: str
    seed: int
    lr: float
    embedding_lr: float
    head_lr: float
    clip_bound: float | None = None
    final_loss: float | None
    step_ms: float
    forward_backward_ms: float
    optimizer_ms: float
    rest_ms: float
    rest_share: float
    overhead_share: float | None = None
    """The lab's own share of the time: ``rest_share`` without the gradient's clip."""
    state_bytes: int
    weight_norm: float | None
    largest_singular_value: float | None
    parameters: int
    curve: Curve
    val_loss_by_frequency: dict[str, float | None] | None = None
    """Final loss by ranks of the target's frequency in the training text; None in results of older versions."""
    data_key: str
    """Hash of the tokens that the run was trained on."""
    environment: dict[str, str | int]
    plan: Plan | None = None
    """None in results of older versions."""
    dynamics: Dynamics | None = None
    """Training dynamics, read from the log when runs are compared."""
