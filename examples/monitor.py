"""Watch spectra while a model trains, in one line, and read them back.

python examples/monitor.py
"""

import json
import tempfile
from pathlib import Path

import torch
from torch import nn

import spectrim


def main(folder: Path, steps: int = 40) -> None:
    """Train a small network on a rule, and print which matrix's update is loudest, and its exact spectrum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 48), nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48), nn.Linear(48, 64))
    optimizer = spectrim.AdamW(spectrim.param_groups(model), lr=1e-2, clip="auto")
    out = folder / "monitor.jsonl"

    with spectrim.SpectralMonitor(model, optimizer, every=10, out=out, exact_steps=[steps]):
        for _ in range(steps):
            tokens = torch.randint(64, (256,))
            nn.functional.cross_entropy(model(tokens), (3 * tokens + 1) % 64).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    for line in out.read_text().splitlines():
        record = json.loads(line)
        entries = record["parameters"]
        name = max(entries, key=lambda name: entries[name]["update_to_weight"])
        print(
            f"step {record['step']}: {name} moved by {entries[name]['update_to_weight']:.2%} of its norm; "
            f"{entries[name]['gradient_spike_share']:.0%} of its gradient's energy is in the spike"
        )
    for kind, values in record["spectra"][name].items():
        print(f"{kind}: " + " ".join(f"{value:.2g}" for value in values[:6]) + " ...")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
