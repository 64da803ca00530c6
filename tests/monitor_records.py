"""Records in the monitor's format that nobody measured, for pages and logs that show such."""

import json
import random
from pathlib import Path
from typing import Any

INSIDE = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def parameter_names(layers: int, inside: tuple[str, ...] = INSIDE) -> list[str]:
    names = [f"model.layers.{layer}.{name}.weight" for layer in range(layers) for name in inside]
    return ["model.embed_tokens.weight", *names, "lm_head.weight"]


def spectrum(draw: random.Random, count: int, size: float, slope: float) -> list[float]:
    return sorted((size * rank**-slope * (1 + 0.02 * draw.random()) for rank in range(1, count + 1)), reverse=True)


def record(
    step: int, names: list[str], *, exact: list[str] | None = None, count: int = 32, seed: int = 0, clips: bool = False
) -> dict[str, Any]:
    """A measurement after ``step`` steps; sizes fall as training goes on, and differ by seed."""
    draw = random.Random(f"{seed} {step}")
    size = (1 + seed) / (1 + step / 50)
    parameters: dict[str, Any] = {}
    for index, name in enumerate(names):
        parameters[name] = {
            "gradient_norm": 0.1 * size * (1 + index / 9),
            "gradient_spectral_norm": 0.05 * size,
            "gradient_stable_rank": 3 + draw.random(),
            "gradient_spike_share": 0.3 + 0.4 * draw.random(),
            "gradient_localisation": 0.2,
            "gradient_tail_index": 3.5,
            "update_rms": 1e-3 * size,
            "update_norm": 0.2 * size,
            "update_spectral_norm": 0.02 * size,
            "update_stable_rank": 20 + draw.random(),
            "update_spike_share": 0.2,
            "update_to_weight": 0.01 * size * (1 + draw.random()),
            "weight_norm": 5.0 + step / 100,
            "weight_spectral_norm": 2.0 + step / 300,
            "weight_stable_rank": 20.0,
            "skipped": 0,
            **({"above_threshold": 0.3 * draw.random()} if clips else {}),
        }
    made: dict[str, Any] = {"step": step, "skipped": 0, "parameters": parameters, "ms": 12.3}
    if exact:
        made["spectra"] = {
            name: {
                "gradient": spectrum(draw, count, 0.05 * size, 1.2),
                "momentum": spectrum(draw, count, 0.04 * size, 0.9),
                "update": spectrum(draw, count, 0.02 * size, 0.3),
                "weight": spectrum(draw, count, 2.0 + step / 300, 0.4),
            }
            for name in exact
        }
    return made


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
