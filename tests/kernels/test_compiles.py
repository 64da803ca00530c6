"""Every kernel compiles for an H100, though there is none: the interpreter takes what the compiler refuses."""

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spectrim.kernels import choice, use
from spectrim.kernels.adam import adam_directions, adamw_step
from spectrim.kernels.ademamix import ademamix_directions
from spectrim.kernels.device import operators, screen, settle, spike, symmetric, thin
from spectrim.kernels.device.spike import TILES
from spectrim.kernels.magnitudes import magnitudes_and_roots
from spectrim.kernels.momentum import momentum_directions
from spectrim.kernels.settling import settle as settled
from spectrim.kernels.spike import SpikeMatrix, spike_step
from spectrim.kernels.symmetric import symmetric_product
from spectrim.kernels.update import apply_updates

TARGET = GPUTarget("cuda", 90, 32)
NAMES = {
    torch.int64: "i64",
    torch.int32: "i32",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}


def compiled(kernel, programs, device, *args, num_warps=4, num_stages=3, **constants):
    """Compile a launch in place of making it, specialised as a launch is; the code for the device."""
    signature, values, hints = {}, {}, {}
    for place, (parameter, value) in enumerate(zip(kernel.params, args, strict=False)):
        name = parameter.name
        if (
            parameter.is_constexpr
            or value is None
            or (type(value) is int and value == 1 and not parameter.do_not_specialize)
        ):
            signature[name], values[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + NAMES[value.dtype]
            hints[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if type(value) is int else "fp32"
            if type(value) is int and value % 16 == 0 and not parameter.do_not_specialize:
                hints[(place,)] = [["tt.divisibility", 16]]
    signature.update(dict.fromkeys(constants, "constexpr"))
    source = ASTSource(fn=kernel, signature=signature, constexprs={**values, **constants}, attrs=hints)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=TARGET, options=options).asm["ptx"]


@pytest.fixture
def assembly(monkeypatch, tmp_path):
    """The code of every launch that a test makes, on tensors of the CPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(choice, "_interpreted", True)  # so that CPU tensors are taken
    codes = []
    for module in (operators, screen, settle, spike, symmetric, thin):
        monkeypatch.setattr(module, "launch", lambda *args, **constants: codes.append(compiled(*args, **constants)))
    with use(True):
        yield codes


def some(dtype=torch.float32):
    # Addresses at whole pages, as a device's are for large tensors.
    return [torch.zeros(8192 + 5, dtype=dtype)[: 4096 + 5] for _ in range(2)]


def steps():
    return [torch.ones(()) for _ in range(2)]


FOUND, TAUS = torch.zeros(()), torch.ones(2)
BFLOAT = torch.bfloat16


@pytest.mark.parametrize("options", [{}, {"found": FOUND, "taus": TAUS, "form": "monotone", "seeds": [1, 2]}])
@pytest.mark.parametrize("state", [torch.float32, BFLOAT])
def test_directions(assembly, options, state):
    adam_directions(some(BFLOAT), some(state), some(state), steps(), some(), beta1=0.9, beta2=0.99, eps=1e-8, **options)
    momentum_directions(some(BFLOAT), some(state), some(), decay=0.9, average=True, nesterov=True, sign=True, **options)
    momenta = [some(state) for _ in range(3)]
    numbers = {"betas": (0.9, 0.99, 0.999), "alpha": 5.0, "eps": 1e-8, "warmup_steps": 10}
    ademamix_directions(some(BFLOAT), *momenta, steps(), some(), **numbers, **options)
    assert len(assembly) == 3
    for code in assembly:
        assert "ld.global.v4" in code
        assert ".local" not in code  # registers suffice


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT, torch.float16])
def test_updates_and_adamw(assembly, dtype):
    numbers = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "found": FOUND, "taus": TAUS}
    adamw_step(some(dtype), some(), some(), some(), steps(), lr=0.1, **numbers, seeds=[1, 2])
    apply_updates(some(dtype), some(), lr=[0.1, FOUND], scale=TAUS, found=FOUND, seeds=[1, 2], steps=steps())
    assert len(assembly) == 2
    for code in assembly:
        assert "ld.global.v4" in code
        assert ".local" not in code


def test_screening(assembly):
    magnitudes, _ = magnitudes_and_roots(some())
    settled(magnitudes, steps(), steps(), FOUND)
    settled(magnitudes, steps(), [step.int() for step in steps()])
    assert len(assembly) == 4
    assert "ld.global.v4" in assembly[0]


@pytest.mark.parametrize(("size", "dtype"), [(64, BFLOAT), (256, torch.float16), (200, BFLOAT)])
def test_symmetric_products_on_tensor_cores(assembly, dtype, size):
    A, matrix = torch.zeros(3, size, size, dtype=dtype), torch.zeros(3, size, size, dtype=dtype)
    symmetric_product(A)
    symmetric_product(A.mT, C=matrix, alpha=2.0, beta=torch.ones(3), gamma=torch.ones(3))
    assert len(assembly) == 2
    for code in assembly:
        assert "wgmma" in code
        if size % 64 == 0:
            assert "cp.async" in code
            assert "st.global.v4" in code


@pytest.mark.parametrize(("rank", "dtype"), [(12, BFLOAT), (61, torch.float32)])
def test_a_step_of_spectra(assembly, rank, dtype):
    lists = [[torch.zeros(256, 256, dtype=kind)] for kind in (dtype, dtype, torch.float32)]
    basis, record = torch.zeros(256, rank), torch.zeros(1)
    numbers = {"lr": [0.1], "weight_decay": [0.1], "decay": 0.9, "average": False, "steps": 2, "found": FOUND}
    scaling = {"rms": 0.2, "keep": 0.9, "share": 0.25, "floor": 1e-30}
    assert spike_step(*lists, [basis], [record], [SpikeMatrix(0, 0, 256, 256, rank, 0, rank, 0)], **numbers, **scaling)
    assert len(assembly) == 23
    for code in assembly:
        assert ".local" not in code
        names = [name for name in TILES if f".entry {name}_kernel(" in code]
        if names:
            # Matrices are read by 16 bytes, and multiplied on tensor cores where their precision allows it.
            assert "ld.global.v4" in code or "cp.async.cg" in code
            assert ("mma" in code) == (TILES[names[0]].precision == "tf32x3")
