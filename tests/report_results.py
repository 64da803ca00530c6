"""Results of comparisons as ``results.json`` holds them, for tests of what reports make of them."""

from typing import Any

from spectrim.lab.experiments.settings import CompareConfig


def entry(losses: list[float | None], **more: Any) -> dict[str, Any]:
    """What ``results.json`` holds of a recipe, of one seed."""
    curve = {"tokens": [100 * (index + 1) for index in range(len(losses))], "val_loss": losses}
    known = {"lr": 0.003, "step_ms": 10.0, "forward_backward_ms": 8.0, "optimizer_ms": 1.5, "rest_ms": 0.5}
    known |= {"state_bytes": 1e6, "weight_norm": 9.0, "largest_singular_value": 2.0}
    ends = {"final_loss": losses[-1], "tokens_to_adamw": None, "curve": curve, "seeds": {"0": {"curve": curve}}}
    return known | ends | more


def paired(mean: float, low: float | None, high: float | None) -> dict[str, Any]:
    return {"mean": mean, "low": low, "high": high, "pairs": 1 if low is None else 3}


def results(recipes: dict[str, Any]) -> dict[str, Any]:
    config = CompareConfig(recipes=tuple(recipes)).model_dump(mode="json")
    return {"recipes": recipes, "config": config, "environment": {"torch": "2.13"}}
