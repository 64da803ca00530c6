"""What steps cost on a device, counted on fake tensors: the kernels have fake forms and state their costs."""

import collections

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from spectrim.kernels import use
from spectrim.kernels.adam import adam_directions, adamw_step
from spectrim.kernels.ademamix import ademamix_directions
from spectrim.kernels.costs import COSTS
from spectrim.kernels.magnitudes import largest_magnitudes, magnitudes_and_roots
from spectrim.kernels.momentum import momentum_directions
from spectrim.kernels.settling import settle
from spectrim.kernels.spike import SpikeMatrix, spike_step
from spectrim.kernels.symmetric import symmetric_product
from spectrim.kernels.update import apply_updates

SHAPES = [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12
LLAMA = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192)] * 16
ENTRIES = sum(rows * columns for rows, columns in SHAPES)
#: Kernels of torch's fused AdamW on these shapes, as an H100 counted them.
FUSED_ADAMW = 6


class Counter(TorchDispatchMode):
    """Counts launches and bytes of the kernels, and what else is dispatched."""

    def __init__(self):
        super().__init__()
        self.launches, self.bytes, self.others = 0, 0, collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name in COSTS:
            cost = COSTS[name](*args, **(kwargs or {}))
            self.launches += cost.launches
            self.bytes += cost.bytes
        elif not function.is_view and not name.startswith(("prim::", "aten::empty")):
            self.others[name] += 1
        if name == "aten::_fused_adamw_":
            return None
        return function(*args, **(kwargs or {}))


def tensors(dtype=torch.float32):
    return [torch.empty(shape, dtype=dtype, device="cuda") for shape in SHAPES]


def scalars():
    return [torch.empty((), device="cuda") for _ in SHAPES]


@pytest.fixture
def fake():
    with FakeTensorMode(), use(True):
        yield


def test_plain_adamw_takes_twelve_launches(fake):
    params, grads, first, second, steps, skipped = *(tensors() for _ in range(4)), scalars(), scalars()
    with Counter() as counter:
        found = settle(largest_magnitudes(grads), steps, skipped)
        numbers = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
        adamw_step(params, grads, first, second, steps, **numbers, found=found)
    assert counter.others == {"aten::_fused_adamw_": 1}
    assert counter.launches + FUSED_ADAMW <= 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_with_shrinkage_reads_gradients_twice_and_weights_once(fake, dtype):
    params, grads, first, second, steps = tensors(dtype), tensors(), tensors(), tensors(), scalars()
    with Counter() as counter:
        magnitudes, roots = magnitudes_and_roots(grads)
        found = settle(magnitudes, steps, [])
        numbers = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
        adamw_step(params, grads, first, second, steps, **numbers, found=found, taus=roots)
    assert not counter.others
    assert counter.launches == 3 + 2 + 2
    assert counter.bytes == pytest.approx(ENTRIES * (4 * 2 + 4 * 4 + 2 * params[0].element_size()), rel=1e-5)


def test_directions_and_updates_take_a_launch_and_an_upload_each(fake):
    grads, states, out, steps = tensors(torch.bfloat16), [tensors() for _ in range(3)], tensors(), scalars()
    calls = {
        "adam": lambda: adam_directions(grads, *states[:2], steps, out, beta1=0.9, beta2=0.95, eps=1e-8),
        "momentum": lambda: momentum_directions(grads, states[0], out, decay=0.9),
        "ademamix": lambda: ademamix_directions(
            grads, *states, steps, out, betas=(0.9, 0.99, 0.999), alpha=5.0, eps=1e-8, warmup_steps=10
        ),
        "apply": lambda: apply_updates(out, states[0], lr=steps[0], scale=torch.empty(len(out), device="cuda")),
    }
    sizes = {"adam": 2 + 16 + 4, "momentum": 2 + 8 + 4, "ademamix": 2 + 24 + 4, "apply": 12}
    for name, call in calls.items():
        with Counter() as counter:
            call()
        assert counter.launches == 2, name
        assert counter.bytes == ENTRIES * sizes[name], name
        assert not counter.others, name


def test_a_symmetric_product_costs_little_more_than_half(fake):
    R = torch.empty(12, 3072, 3072, dtype=torch.float16, device="cuda")
    with Counter() as counter:
        product = symmetric_product(R, R, C=R, alpha=torch.empty(12, device="cuda"))
    assert (product.shape, product.dtype, product.device.type) == (R.shape, R.dtype, "cuda")
    assert counter.launches == 1
    flops = COSTS["spectrim::symmetric_product"](R, None, None).flops
    assert 0.5 < flops["float16"] / (2 * 12 * 3072**3) < 0.53


@pytest.mark.parametrize("shapes", [SHAPES, LLAMA], ids=["gpt2-small", "llama-1b"])
def test_a_step_of_spectra_passes_over_memory_seven_times_in_fourteen_launches(fake, shapes):
    weights, grads, buffers = ([torch.empty(shape, device="cuda") for shape in shapes] for _ in range(3))
    ranks = [round(0.015 * min(shape)) for shape in shapes]
    bases = [torch.empty(shape[1], rank, device="cuda") for shape, rank in zip(shapes, ranks, strict=True)]
    records = [torch.empty(1, device="cuda") for _ in shapes]
    matrices = [SpikeMatrix(i, 0, *shapes[i], rank, 0, rank, 0) for i, rank in enumerate(ranks)]
    numbers = {"lr": [1e-3] * len(shapes), "weight_decay": [0.1] * len(shapes), "decay": 0.95, "average": False}
    scaling = {"rms": 0.2, "keep": 0.9, "share": 0.25, "floor": 1e-30}
    with Counter() as counter:
        assert spike_step(weights, grads, buffers, bases, records, matrices, steps=1, **numbers, **scaling)
    assert counter.launches == 14
    assert not counter.others
    # Momentum is made (12 bytes an entry), read for the products with U, and read with the weights (12); what has k
    # columns adds less than a tenth.
    assert 28 < counter.bytes / sum(rows * columns for rows, columns in shapes) < 28 * 1.1
