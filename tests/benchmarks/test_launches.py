"""What a step launches, waits for and keeps in memory on a GPU, counted without one; and whether the counting is right.

The counts that recipes are held to are in :data:`LAUNCHES`, for those in :data:`REACHED`. What H100s measured is the
oracle of the counting, for torch's own optimizers, which do not change with this project.
"""

import itertools
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import spectrim
import spectrim.kernels

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from gpu.contenders import CONTENDERS, MODELS, MONITOR_LAUNCHES  # noqa: E402
from gpu.costs import COSTS  # noqa: E402
from gpu.counting import Cost, fake_cuda, measure, measure_monitor  # noqa: E402

#: The most that a step may launch on the 48 matrices of GPT-2 small, with Triton kernels. The goals are in
#: gpu/contenders.py; "spectra", "adamw+clip" and "adamw+clip bf16" have not reached theirs, 150, 150 and 160.
LAUNCHES = {
    "adamw": 12,
    "adamw+shrink": 40,
    "spectra": 245,
    "adamw+clip": 180,
    "muon steps5": 140,
    "adamw+clip bf16": 190,
}
#: The same in eager form, which is what runs by default.
EAGER_LAUNCHES = {"adamw": 25, "spectra": 260, "adamw+clip": 200, "muon steps5": 195}

BUCKET = 256 * 2**20
LARGEST = 4 * max(rows * columns for rows, columns in MODELS["gpt2-small"])
#: Bytes beyond weights, gradients and state.
MEMORY = {name: max(2 * BUCKET, LARGEST) for name in LAUNCHES} | {"adamw": 16 * 2**10}

MEASURED = json.loads((ROOT / "benchmarks" / "results" / "h100-2026-11-27.json").read_text(encoding="utf-8"))
OF_TORCH = [row for row in MEASURED["optimizers"] if row["name"].startswith("torch.") and row["precision"] == "highest"]


@cache
def counted(name: str, kernels: bool = True) -> Cost:
    with spectrim.kernels.use(kernels):
        return measure(CONTENDERS[name], MODELS["gpt2-small"], CONTENDERS[name].weights)


HELD = list(LAUNCHES)


@pytest.mark.parametrize("name", HELD)
def test_a_step_launches_no_more_than_it_may(name):
    assert counted(name).kernels <= LAUNCHES[name]


@pytest.mark.parametrize("name", HELD)
def test_a_step_neither_waits_for_the_device_nor_copies_from_pageable_memory(name):
    assert (counted(name).waits, counted(name).uploads) == (0, 0)


@pytest.mark.parametrize("name", HELD)
def test_a_step_needs_no_more_memory_than_it_may(name):
    assert counted(name).extra <= MEMORY[name]


@pytest.mark.parametrize("name", EAGER_LAUNCHES)
def test_a_step_without_kernels_launches_little_more_and_waits_as_little(name):
    cost = counted(name, kernels=False)
    assert cost.kernels <= EAGER_LAUNCHES[name]
    assert (cost.waits, cost.uploads) == (0, 0)


def test_a_monitor_launches_little_on_a_step_that_it_does_not_measure_and_never_waits():
    cost = measure_monitor(CONTENDERS["adamw"], MODELS["gpt2-small"])
    # At least the copy of the samples.
    assert 1 <= cost.kernels <= MONITOR_LAUNCHES
    assert (cost.waits, cost.uploads) == (0, 0)


@pytest.mark.parametrize("row", OF_TORCH, ids=lambda row: f"{row['name']} {row['model']}")
def test_counts_and_times_of_torchs_optimizers_are_those_of_an_h100(row):
    cost = measure(CONTENDERS[row["name"]], MODELS[row["model"]])
    assert cost.kernels == (row["kernels"] if "AdamW" in row["name"] else pytest.approx(row["kernels"], rel=0.1))
    assert cost.extra / 2**20 == pytest.approx(row["extra_mb"], rel=0.1, abs=1)
    assert 0.7 < cost.seconds * 1e3 / row["ms"] < 1.45
    assert (cost.waits > 0) == row["waits"]


def count(work) -> Cost:
    """The cost of work on a stack of four 256x256 matrices."""
    with fake_cuda() as recorder:
        X = torch.empty(4, 256, 256, device="cuda")
        recorder.begin()
        work(X)
        return recorder.cost


def test_only_copies_from_pageable_memory_are_uploads_and_only_blocking_ones_wait():
    found = {}
    with fake_cuda() as recorder:
        for pinned, non_blocking, into in itertools.product((False, True), repeat=3):
            source = torch.tensor([1.0, 2.0], pin_memory=pinned)
            target = torch.empty(2, device="cuda")
            recorder.begin()
            if into:
                target.copy_(source, non_blocking)
            else:
                assert source.to("cuda", non_blocking=non_blocking).device.type == "cuda"
            found.setdefault((pinned, non_blocking), set()).add((recorder.cost.uploads, recorder.cost.waits))
    assert found == {
        (False, False): {(1, 1)},
        (False, True): {(1, 0)},
        (True, False): {(0, 1)},
        (True, True): {(0, 0)},
    }


def test_memory_that_is_allocated_pinned_is_known_as_pinned():
    with fake_cuda():
        assert torch.empty(3, pin_memory=True)[1:].is_pinned()
        assert torch.zeros(3).pin_memory().is_pinned()
        assert not torch.zeros(3).is_pinned()


@pytest.mark.parametrize(
    "read",
    [lambda X: X[0, 0, 0].item(), lambda X: X[0, 0].tolist(), lambda X: bool(X[0, 0, 0]), lambda X: X.cpu()],
    ids=["item", "tolist", "bool", "cpu"],
)
def test_reading_the_device_waits_once(read):
    assert count(read).waits == 1


def test_products_are_counted_by_the_kind_of_their_operands():
    flops = 2 * 4 * 256**3
    assert count(lambda X: X @ X).flops == {"float32": flops}
    assert count(lambda X: X.half() @ X.half()).flops == {"float16": flops}
    assert count(lambda X: X.clone().baddbmm_(X, X)).flops == {"float32": flops}
    assert count(lambda X: torch.bmm(X.bfloat16(), X.bfloat16(), out_dtype=torch.float32)).flops == {"bfloat16": flops}
    torch.set_float32_matmul_precision("high")
    try:
        assert count(lambda X: X @ X).flops == {"tf32": flops}
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_sum_of_product_and_summand_copies_the_summand_unless_it_is_written_in_place():
    assert count(lambda X: torch.baddbmm(X, X, X)).kernels == 2
    assert count(lambda X: X.baddbmm_(X, X)).kernels == 1


def test_bytes_are_those_read_and_written():
    size = 4 * 4 * 256**2
    assert count(lambda X: X + 1).bytes == 2 * size
    assert count(lambda X: X.add_(X.mT)).bytes == 3 * size
    assert count(lambda X: X.zero_()).bytes == size
    assert count(lambda X: torch.mul(X, 2, out=torch.empty_like(X))).bytes == 2 * size
    assert count(lambda X: torch._foreach_mul_(list(X.unbind()), 2.0)).bytes == 2 * size
    assert count(lambda X: torch._foreach_zero_(list(X.unbind()))).bytes == size


def test_lists_of_several_dtypes_or_layouts_are_taken_tensor_by_tensor():
    assert count(lambda X: torch._foreach_add_(list(X.unbind()), list(X.unbind()))).kernels == 1
    mixed = count(lambda X: torch._foreach_add_(list(X.unbind()), [x.half() for x in X.unbind()]))
    assert mixed.kernels == 4 + 4
    assert count(lambda X: torch._foreach_add_(list(X.unbind()), list(X.mT.unbind()))).kernels == 4
    with pytest.raises(RuntimeError, match="one dtype"):
        count(lambda X: torch._fused_sgd_(
            list(X.unbind()), list(X.mT.unbind()), [], weight_decay=0.0, momentum=0.0, lr=1.0, dampening=0.0,
            nesterov=False, maximize=False, is_first_step=False,
        ))  # fmt: skip


@torch.library.custom_op("spectrim::counted_in_a_test", mutates_args=("targets",))
def counted_in_a_test(targets: list[torch.Tensor], sources: list[torch.Tensor], factor: float) -> torch.Tensor:
    raise NotImplementedError


@counted_in_a_test.register_fake
def _(targets, sources, factor):
    return sources[0].new_empty(len(sources))


def test_a_custom_operator_is_one_kernel_that_reads_all_and_writes_what_it_says(monkeypatch):
    def work(X):
        counted_in_a_test(list(X[:2].unbind()), list(X[2:].unbind()), 2.0)

    size = 4 * 256**2
    cost = count(work)
    assert (cost.kernels, cost.bytes, cost.waits) == (1, 2 * size + 2 * size + 2 * size + 2 * 4, 0)
    monkeypatch.setitem(
        COSTS, "spectrim::counted_in_a_test", lambda targets, sources, factor: (len(sources), 7, {"float16": 9.0})
    )
    cost = count(work)
    assert (cost.kernels, cost.bytes, cost.flops) == (2, 7, {"float16": 9.0})


def test_memory_is_the_peak_of_temporaries_and_what_is_kept_beside_state():
    class Keeping(torch.optim.SGD):
        def step(self):
            (param,) = self.param_groups[0]["params"]
            self.kept = torch.empty(1000, device="cuda")
            a = param + 1
            b = a + 1
            del a
            b + 1

    with_two_temporaries = measure(lambda params: Keeping(params), [(250, 4)])
    # The old one is freed when the new one is there.
    assert (with_two_temporaries.peak, with_two_temporaries.held) == (2 * 4000, 4000)


def test_a_step_of_today_is_counted_to_its_end():
    cost = measure(lambda params: spectrim.AdamW(params, clip="auto"), [(96, 64), (64, 96)])
    assert cost.kernels > 0
    assert cost.flops


def test_the_script_named_like_nvidias_package_does_not_hide_it(tmp_path):
    bindings = tmp_path / "cuda" / "bindings"
    bindings.mkdir(parents=True)
    (bindings / "__init__.py").write_text("found = True")
    code = "import sys; sys.path[:] = [*sys.argv[1:], *sys.path]; from cuda.bindings import found; assert found"
    command = [sys.executable, "-c", code, str(ROOT / "benchmarks")]
    subprocess.run([*command, str(tmp_path)], check=True)
    failed = subprocess.run(command, capture_output=True, text=True)
    assert "ModuleNotFoundError: No module named 'cuda'" in failed.stderr
