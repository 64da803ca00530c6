"""Symmetric products by the kernel, against float64."""

import pytest
import torch

from spectrim.kernels.symmetric import symmetric_product

DTYPES = {torch.float16: 2**-11, torch.bfloat16: 2**-8}
SHAPES = [(1, 1), (64, 33), (130, 200), (256, 128)]


def close(actual, expected, dtype, size=1.0):
    torch.testing.assert_close(actual.double(), expected, rtol=1.5 * DTYPES[dtype], atol=2 * size * DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lies", ["rows", "columns", "part"])
def test_a_matrix_times_its_transpose(dtype, shape, lies):
    rows, depth = shape
    if lies == "rows":
        A = torch.randn(2, rows, depth)
    elif lies == "columns":
        A = torch.randn(2, depth, rows).mT
    else:
        A = torch.randn(2, rows + 3, depth + 5)[:, 1:-2, 2:-3]
    A = A.to(dtype) if lies == "rows" else torch.empty_strided(A.shape, A.stride(), dtype=dtype).copy_(A)
    product = symmetric_product(A)
    close(product, A.double() @ A.double().mT, dtype)
    assert product.is_contiguous()
    assert torch.equal(product, product.mT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("rows", [7, 200, 256])
def test_a_quadratic_of_a_symmetric_matrix_in_one_product(dtype, vectors, rows):
    X = torch.randn(3, rows, rows) / rows**0.5
    R = (X @ X.mT / 4).to(dtype)
    R = R.tril() + R.tril(-1).mT
    numbers = [torch.tensor([1.5, -0.5, 2.0]), torch.tensor([-2.0, 0.3, 1.0]), torch.tensor([3.0, 1.0, -1.0])]
    alpha, beta, gamma = numbers if vectors else [1.5, -2.0, 3.0]
    product = symmetric_product(R, R, C=R, alpha=alpha, beta=beta, gamma=gamma)
    a, b, c = (torch.as_tensor(number).double().view(-1, 1, 1) for number in (alpha, beta, gamma))
    exact = a * (R.double() @ R.double()) + b * R.double() + c * torch.eye(rows, dtype=torch.float64)
    close(product, exact, dtype, size=3.0)
    assert torch.equal(product, product.mT)


def test_matrices_that_commute_have_a_product_that_is_symmetric_to_the_bit():
    X = torch.randn(2, 150, 150) / 12
    R = (X @ X.mT).half()
    Q = (R.float() @ R.float() * 0.3 + R.float()).half()
    product = symmetric_product(Q, R)
    close(product, Q.double() @ R.double(), torch.float16, size=4.0)
    assert torch.equal(product, product.mT)


def test_half_precision_is_accumulated_in_float32():
    A = torch.full((1, 4, 5000), 1.0, dtype=torch.float16)
    assert (symmetric_product(A, alpha=0.5) == 2500).all()
