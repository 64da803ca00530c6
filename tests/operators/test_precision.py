"""Products are what they say under every switch, and leave the switches as they were."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from spectrim.operators import _stack_product
from spectrim.operators._precision import float32_product


def half_product(A, B):
    with _stack_product.arithmetic(A.device, A.dtype):
        return _stack_product.half_product(A, B)


PRODUCTS = {torch.float32: float32_product, torch.float16: half_product, torch.bfloat16: half_product}


def switches():
    settings = torch.backends.cuda.matmul
    return {
        "cuda": settings.fp32_precision,
        "mkldnn": torch.backends.mkldnn.matmul.fp32_precision,
        "float16": settings.allow_fp16_reduced_precision_reduction,
        "bfloat16": settings.allow_bf16_reduced_precision_reduction,
        "accumulation": settings.allow_fp16_accumulation,
    }


class Watched(TorchDispatchMode):
    """Notes the operators that compute, and the switches that they meet."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((func._schema.name, switches()))
        return func(*args, **kwargs or {})


@pytest.fixture(autouse=True)
def settable(monkeypatch):
    """Lets switches be set, also where another test's imports have frozen them, as torch's own test utilities do."""
    names = torch.backends.disable_global_flags.__globals__
    monkeypatch.setitem(names, "__allow_nonbracketed_mutation_flag", True)


@pytest.fixture(params=["legacy high", "legacy medium", "new", "mixed", "for everything"])
def reduced(request):
    """Each way to allow reduced precision that torch knows."""
    settings = torch.backends.cuda.matmul
    if request.param.startswith("legacy"):
        torch.set_float32_matmul_precision(request.param.split()[1])
    elif request.param == "for everything":
        torch.backends.fp32_precision = "tf32"
    else:
        if request.param == "mixed":
            torch.set_float32_matmul_precision("medium")
        settings.fp32_precision = "tf32"
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    settings.allow_fp16_accumulation = True
    yield
    settings.allow_fp16_accumulation = False
    settings.allow_fp16_reduced_precision_reduction = settings.allow_bf16_reduced_precision_reduction = True
    torch.backends.fp32_precision = "none"
    for each in (settings, torch.backends.mkldnn.matmul):
        each.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", PRODUCTS)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_product_meets_no_switch_that_allows_less_and_leaves_all_as_they_were(reduced, dtype, autocast):
    A, B = torch.randn(3, 70, 40).to(dtype), torch.randn(3, 90, 40).to(dtype).mT
    before = switches()
    with Watched() as watched, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        result = PRODUCTS[dtype](A, B)
    assert switches() == before
    assert result.dtype == dtype
    (met,) = [state for name, state in watched.seen if name == "aten::bmm"]
    if dtype == torch.float32:
        assert {met["cuda"], met["mkldnn"]} <= {"ieee", "none"}
    else:
        assert not any(met[switch] for switch in ("float16", "bfloat16", "accumulation"))
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), A.double() @ B.double(), rtol=rounding, atol=2e-5)


def test_the_switches_come_back_after_an_error(reduced):
    before = switches()
    for dtype, product in PRODUCTS.items():
        with pytest.raises(RuntimeError):
            product(torch.ones(2, 3, dtype=dtype), torch.ones(2, 3, dtype=dtype))
        assert switches() == before


@pytest.mark.parametrize("dtype", PRODUCTS)
def test_a_compiler_sees_an_opaque_product(dtype):
    product, name = PRODUCTS[dtype], "float32_product" if dtype == torch.float32 else "half_bmm"
    A, B = torch.randn(3, 70, 40).to(dtype), torch.randn(3, 90, 40).to(dtype)
    graphs = []

    def note(graph, examples):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda A, B: product(A, B.mT) * 2, fullgraph=True, backend=note)
    torch.testing.assert_close(compiled(A, B), product(A, B.mT) * 2, rtol=0, atol=0)
    assert any(f"spectrim.{name}" in str(node.target) for node in graphs[0].graph.nodes)


@pytest.mark.parametrize("dtype", PRODUCTS)
def test_a_fake_product_is_one_operator(dtype):
    with FakeTensorMode(), Watched() as watched:
        result = PRODUCTS[dtype](torch.empty(3, 70, 40, dtype=dtype), torch.empty(3, 40, 90, dtype=dtype))
    assert result.shape == (3, 70, 90)
    meta = torch.empty(3, 40, 40, dtype=dtype, device="meta")
    assert PRODUCTS[dtype](meta, meta).shape == (3, 40, 40)
    assert [name for name, _ in watched.seen if name.endswith("mm")] == ["aten::bmm"]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_product_has_derivatives(compiled):
    A, B = (torch.randn(shape, requires_grad=True) for shape in ((3, 20, 30), (3, 30, 10)))
    product = torch.compile(float32_product, fullgraph=True, backend="aot_eager") if compiled else float32_product
    product(A, B).square().sum().backward()
    gradient = 2 * (A @ B).detach()
    torch.testing.assert_close(A.grad, gradient @ B.detach().mT, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(B.grad, A.detach().mT @ gradient, rtol=1e-5, atol=1e-4)
