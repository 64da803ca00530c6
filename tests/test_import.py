"""What an import brings along: nothing that takes long and that nobody has asked for."""

import subprocess
import sys

import spectrim

SLOW = ("torch.distributed.tensor", "sympy", "torch._dynamo", "spectrim.lab", "triton")


def test_optimizers_and_monitor_import_nothing_slow():
    code = (
        "import sys, torch; before = set(sys.modules); import spectrim; alone = set(sys.modules) - before;"
        "spectrim.AdamW, spectrim.SpectralMonitor, spectrim.soft_clip;"
        f"print(sorted(name for name in {SLOW!r} if name in set(sys.modules) - before), len(alone))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().rpartition(" ")[0] == "[]"
    assert int(done.stdout.rpartition(" ")[2]) <= 2


def test_every_public_name_is_there():
    assert {name for name in spectrim.__all__ if getattr(spectrim, name, None) is None} == set()
    assert set(spectrim.__all__) <= set(dir(spectrim))
