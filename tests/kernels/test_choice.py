"""Which form runs: one rule, off by default."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from spectrim.kernels import choice, use


def on_cuda(*shapes, dtype=torch.float32):
    """Fake tensors: they have a device, and need none."""
    return [torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes]


def test_kernels_are_off_until_they_are_switched_on_and_off_again():
    with FakeTensorMode():
        tensors = on_cuda((3, 4), (5,))
        assert not choice.kernel_runs("apply_updates", tensors, tensors)
        with use(True):
            assert choice.kernel_runs("apply_updates", tensors, tensors)
            with use(False):
                assert not choice.kernel_runs("apply_updates", tensors, tensors)
            assert choice.kernel_runs("apply_updates", tensors, tensors)
            use(None)
            assert not choice.kernel_runs("apply_updates", tensors, tensors)
        assert not choice.kernel_runs("apply_updates", tensors, tensors)


def test_a_kernel_is_on_by_default_where_it_was_measured_to_win(monkeypatch):
    monkeypatch.setitem(choice.MEASURED, (99, 0), frozenset({"screen"}))
    monkeypatch.setattr(choice, "_capability", lambda index: (99, 0))
    with FakeTensorMode():
        assert choice.switched_on("screen", torch.device("cuda"))
        assert not choice.switched_on("settle", torch.device("cuda"))
        monkeypatch.setattr(choice, "_capability", lambda index: (98, 0))
        assert not choice.switched_on("screen", torch.device("cuda"))


def test_what_a_kernel_cannot_take_goes_the_eager_way():
    with FakeTensorMode(), use(True):
        full, half = on_cuda((3, 4), (5, 6)), on_cuda((3, 4), (5, 6), dtype=torch.float16)
        assert choice.kernel_runs("k", full, half)
        assert choice.kernel_runs("k", [x.mT for x in full], [x.mT for x in half])
        assert choice.kernel_runs("k", full, scalars=on_cuda((), ()))
        assert not choice.kernel_runs("k", full, [x.mT for x in on_cuda((4, 3), (6, 5))])
        assert not choice.kernel_runs("k", [torch.empty_strided((3, 2), (4, 1), device="cuda")])
        assert not choice.kernel_runs("k", on_cuda((3,), dtype=torch.float64))
        assert not choice.kernel_runs("k", full, scalars=on_cuda((), dtype=torch.int64))
        assert not choice.kernel_runs("k", full, scalars=[torch.empty(())])
        assert not choice.kernel_runs("k", full, on_cuda((3, 4), (6, 5)))
        assert not choice.kernel_runs("k", [])
        assert not choice.kernel_runs("k", [torch.empty(3)])


def test_a_switch_that_is_none_of_three_is_refused():
    with pytest.raises(ValueError, match="kernels='on': expected True, False or None"):
        use("on")


@pytest.mark.parametrize(("value", "said"), [("1", "True"), ("yes", "refused")])
def test_the_environment_sets_the_switch_and_importing_spectrim_does_not_import_triton(value, said):
    program = (
        "import sys, spectrim, spectrim.kernels.adam, spectrim.kernels.magnitudes, spectrim.kernels.symmetric\n"
        "print(spectrim.kernels.choice._switch, 'triton' in sys.modules)"
    )
    environment = {**os.environ, "SPECTRIM_KERNELS": value}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    if value == "yes":
        assert "SPECTRIM_KERNELS='yes' in the environment: expected 1, 0 or nothing" in done.stderr
    else:
        assert done.stdout.split() == [said, "False"], done.stderr
