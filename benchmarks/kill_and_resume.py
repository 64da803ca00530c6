"""Kill one run at random moments, resume it each time, and compare it with a run that nobody disturbed.

    python benchmarks/kill_and_resume.py --kills 20 --seed 0

Signals are drawn from kill -9 (half of all), SIGTERM and Ctrl-C, moments from start-up, training and checkpoint writes
alike. In between, the newest checkpoint is cut short now and then, as a file system that lost its last writes would.
A line a kill says where it hit; the last lines say whether weights, optimizer, random state and log are equal to the
bit, and the exit code is 1 if they are not.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from spectrim.lab.logging.log import read_log

SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
STARTED = 0.2
"""Share of kills that hit at a random time after the start of the process; the others hit in training."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=25, help="steps between checkpoints")
    parser.add_argument("--recipe", default="adamw+clip")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        return kill_and_resume(arguments, Path(name))


def kill_and_resume(arguments: argparse.Namespace, folder: Path) -> int:
    draw = random.Random(arguments.seed)
    steps, every, run = arguments.steps, arguments.every, folder / "killed"
    flags = ["--preset", "tiny", "--steps", steps, "--checkpoint-every", every, "--cache-dir", folder / "cache"]
    flags += ["--batch-size", 4, "--sequence-length", 32, "--set", "evaluation.batches=2"]
    # As in the other process: how a sum is split among threads decides its rounding.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(out: Path, *more: object) -> list[str]:
        parts = ["-m", "spectrim", "train", arguments.recipe, "--out", out, *flags, *more]
        return [sys.executable, *map(str, parts)]

    began = time.monotonic()
    subprocess.run(command(folder / "whole"), env=environment, check=True, stderr=subprocess.DEVNULL)
    seconds = time.monotonic() - began
    print(f"undisturbed: {steps} steps in {seconds:.0f} s, a checkpoint every {every}")

    for kill in range(1, arguments.kills + 1):
        number = draw.choice(SIGNALS)
        before = kept_step(run)
        process = subprocess.Popen(
            command(run, "--resume"), env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        if draw.random() < STARTED:
            moment = draw.uniform(0, 6)
            time.sleep(moment)
            where = f"{moment:.2f} s after its start"
        else:
            # At most the share of steps that leaves every later kill something to hit.
            share = draw.uniform(0, (steps - before) / (arguments.kills - kill + 2))
            target = logged(run) + int(share)
            while process.poll() is None and logged(run) <= target:
                time.sleep(draw.uniform(0, 0.01))
            where = "in training"
        writing = any(run.glob("checkpoints/.*.partial"))
        process.send_signal(number)
        told = process.communicate()[1].splitlines()
        done, kept = logged(run), kept_step(run)
        print(
            f"{kill:2d} {number.name:7s} {where}{', writing a checkpoint' if writing else ''}: step {done}, "
            f"checkpoint {kept}, {done - kept} steps lost, exit {process.returncode}"
        )
        if process.returncode == 0:
            print("   the run had ended before the kill")
        for line in told:
            if "warning" in line or "Error" in line:
                print(f"   {line.replace(str(run), 'run')}")
        if done - kept > every:
            print(f"more steps lost than {every}")
            return 1
        if kill % 7 == 0 and kept:
            newest = run / "checkpoints" / f"step-{kept:08d}.pt"
            newest.write_bytes(newest.read_bytes()[: draw.randrange(newest.stat().st_size)])
            print(f"   {newest.name} cut short")
    subprocess.run(command(run, "--resume"), env=environment, check=True, stderr=subprocess.DEVNULL)
    return compare(folder / "whole", run, steps)


def logged(run: Path) -> int:
    """Whole records in the log."""
    file = run / "log.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def kept_step(run: Path) -> int:
    """The step of the newest checkpoint."""
    return max((int(path.stem.removeprefix("step-")) for path in run.glob("checkpoints/step-*.pt")), default=0)


def compare(whole: Path, killed: Path, steps: int) -> int:
    states = [torch.load(run / "checkpoints" / f"step-{steps:08d}.pt", weights_only=True) for run in (whole, killed)]
    checks = {key: equal(states[0][key], states[1][key]) for key in ("model", "optimizer", "random_state")}
    logs = [[untimed(record) for record in read_log(run / "log.jsonl")] for run in (whole, killed)]
    checks["log"] = logs[0] == logs[1] and [record["step"] for record in logs[1]] == list(range(1, steps + 1))
    checks["no partial files"] = not list(killed.rglob("*.partial"))
    for name, passed in checks.items():
        print(f"{name}: {'as it should be' if passed else 'NOT as it should be'}")
    return 0 if all(checks.values()) else 1


def untimed(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if not key.endswith("_ms")}


def equal(one: Any, two: Any) -> bool:
    """Equal to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    return bool(one == two)


if __name__ == "__main__":
    sys.exit(main())
