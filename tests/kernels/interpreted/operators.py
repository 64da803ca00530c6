"""The kernels as operators of torch: their schemas, fake forms, and what a compiler makes of them."""

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from spectrim.kernels import use
from spectrim.kernels.adam import adam_directions, adamw_step
from spectrim.kernels.device import adam, ademamix, momentum, screen, settle, spike, stacks, symmetric, update
from spectrim.kernels.magnitudes import largest_magnitudes, magnitudes_and_roots
from spectrim.kernels.settling import settle as settled
from spectrim.kernels.symmetric import symmetric_product
from spectrim.kernels.update import apply_updates


def some(*shape):
    return [torch.rand(shape or (5, 4)) for _ in range(3)]


def steps():
    return [torch.tensor(float(t)) for t in (1, 2, 3)]


FOUND, TAUS = torch.tensor(0.0), torch.rand(3)
RUNS = [0, 0, 20, 1, 0, 20, 2, 0, 20]
LAST = (FOUND, TAUS, RUNS, "hard", [1, 2, 3])
LR = ([0.1, 0.2, 0.0], [torch.tensor(0.1)], [-1, -1, 0])
CALLS = {
    "adam_directions": (
        adam.adam_directions,
        lambda: (*(some() for _ in range(3)), steps(), some(), 0.9, 0.99, 1e-8, *LAST),
    ),
    "adamw_step": (
        adam.adamw_step,
        lambda: (*(some() for _ in range(4)), steps(), *LR, [0.1] * 3, 0.9, 0.99, 1e-8, *LAST),
    ),
    "momentum_directions": (
        momentum.momentum_directions,
        lambda: (some(), some(), some(), 0.9, True, True, False, *LAST, steps()),
    ),
    "ademamix_directions": (
        ademamix.ademamix_directions,
        lambda: (*(some() for _ in range(4)), steps(), some(), [0.9, 0.99, 0.999], 5.0, 1e-8, 10, *LAST),
    ),
    "apply_updates": (
        update.apply_updates,
        lambda: (some(), some(), *LR, [0.1] * 3, 1.0, TAUS, RUNS, FOUND, [1, 2, 3], steps()),
    ),
    "spike_step": (
        spike.spike_step,
        lambda: (
            *(some() for _ in range(3)),
            some(4, 2),
            some(1),
            *LR,
            [0.1] * 3,
            [number for i in range(3) for number in (i, 0, 5, 4, 2, 0, 2, 0)],
            *(0.9, False, 2, [0.2, 0.9, 0.25, 1e-30], FOUND),
        ),
    ),
    "screen": (screen.screen, lambda: (some(), RUNS[:6], None, True, True)),
    "settle": (settle.settle, lambda: (torch.rand(3), steps(), steps(), FOUND)),
    "symmetric_product": (
        symmetric.symmetric_product,
        lambda: (torch.rand(3, 5, 5).half(), None, torch.rand(3, 5, 5).half(), None, TAUS, None, 2.0, 1.0, 0.5),
    ),
    "gram_product": (
        symmetric.gram_product,
        lambda: (torch.rand(3, 5, 4).half(), TAUS, torch.rand(3, 5, 5).half()),
    ),
    "product_less": (
        symmetric.product_less,
        lambda: (torch.rand(3, 5, 5).half(), torch.rand(3, 5, 4).half(), torch.rand(3, 5, 4), TAUS),
    ),
    "combine": (
        stacks.combine,
        lambda: ([torch.rand(3, 5, 4)], [torch.rand(3, 5, 4)], TAUS, [torch.rand(3, 5, 4).half()], TAUS),
    ),
    "square_sums": (stacks.square_sums, lambda: ([torch.rand(2, 5, 4), torch.rand(1, 3, 3)],)),
    "clip_scales": (
        stacks.clip_scales,
        lambda: ([torch.rand(2, 5, 4), torch.rand(1, 3, 3)], TAUS, 1.0, 11.0, 24.0, 1e-3, 1e-60),
    ),
    "program_numbers": (
        stacks.program_numbers,
        lambda: (torch.rand(3, 5, 5), TAUS, torch.rand(4, 3), torch.rand(4, 1), torch.rand(2), 1e-7),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_operators_keep_what_they_declare(name):
    operator, arguments = CALLS[name]
    torch.library.opcheck(getattr(torch.ops.spectrim, operator.__name__).default, arguments())


def whole_step(params, grads, exp_avgs, exp_avg_sqs, counts, lr):
    found = settled(largest_magnitudes(grads), counts, [])
    stack = torch.empty(3, 5, 4)
    adam_directions(
        grads, exp_avgs, exp_avg_sqs, counts, list(stack.unbind()), beta1=0.9, beta2=0.99, eps=1e-8, found=found
    )
    scale = torch.linalg.vector_norm(stack, dim=(-2, -1)).reciprocal()
    apply_updates(params, list(stack.unbind()), lr=lr, weight_decay=0.1, scale=scale, found=found)


def shrunk_step(params, grads, exp_avgs, exp_avg_sqs, counts, lr):
    magnitudes, roots = magnitudes_and_roots(grads)
    found = settled(magnitudes, counts, [])
    options = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "found": found, "taus": roots.square()}
    adamw_step(params, grads, exp_avgs, exp_avg_sqs, counts, lr=lr, **options)


@pytest.mark.parametrize("step", [whole_step, shrunk_step])
def test_a_compiled_step_has_no_breaks_and_does_not_recompile_for_another_rate(step):
    eager = (some(), some(), some(), some(), steps())
    compiled = tuple([tensor.clone() for tensor in tensors] for tensors in eager)
    with use(True):
        torch._dynamo.reset()
        function = torch.compile(step, backend="aot_eager", fullgraph=True)
        for rate in (0.1, 0.2, 0.3):
            step(*eager, torch.tensor(rate))
            with torch._dynamo.config.patch(error_on_recompile=rate > 0.1):
                function(*compiled, torch.tensor(rate))
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other)


def test_a_compiler_clones_no_list_that_is_written_to():
    arguments = (some(), some(), some(), some(), steps(), torch.tensor(0.1))
    with use(True):
        torch._dynamo.reset()
        _, code = run_and_get_code(torch.compile(whole_step, fullgraph=True), *arguments)
    body = code[0][code[0].index("def call(") : code[0].index("def get_args")]
    calls = [line for line in body.splitlines() if "torch.ops.spectrim." in line and ".default(" in line]
    assert len(calls) == 4
    # The stack of directions and the norms of its matrices; nothing for weights, gradients or moments.
    assert "clone" not in body
    assert "copy_" not in body
    for name in ("adam_directions", "apply_updates"):
        call = next(line for line in calls if name in line)
        first = call[call.index("([") : call.index("]")]
        assert "arg" in first
        assert "buf" not in first


def test_a_symmetric_product_compiles_whole():
    A, beta = torch.rand(3, 5, 5).half(), torch.rand(3)
    with use(True):
        torch._dynamo.reset()
        compiled = torch.compile(lambda X, b: symmetric_product(X, X, C=X, beta=b), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(A, beta), symmetric_product(A, A, C=A, beta=beta))
