"""Small matrices gain nothing from threads, and on a busy machine threads that wait for each other cost a lot."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def recorded():
    """Gradients and Adam directions of a small network's m x n layer while it learns, as a function of (m, n)."""

    def record(shape):
        m, n = shape
        generator = torch.Generator().manual_seed(0)
        W = (torch.randn(m, n, generator=generator) / n**0.5).requires_grad_()
        head = (torch.randn(10, m, generator=generator) / m**0.5).requires_grad_()
        optimizer = torch.optim.Adam([W, head], lr=3e-3)
        teacher = torch.randn(10, n, generator=generator)
        matrices = []
        for step in range(1, 41):
            x = torch.randn(32, n, generator=generator) * torch.logspace(0, -2, n)
            target = (x @ teacher.T).argmax(-1)
            loss = torch.nn.functional.cross_entropy(torch.tanh(x @ W.T) @ head.T, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step in (1, 10, 40):
                state = optimizer.state[W]
                matrices.append((f"gradient of step {step}", W.grad.clone()))
                corrected = (state["exp_avg_sq"] / (1 - 0.999**step)).sqrt() + 1e-8
                matrices.append((f"direction of step {step}", state["exp_avg"] / (1 - 0.9**step) / corrected))
        return matrices

    return record
