"""Symmetric products by the kernels: their accuracy is tested with the operators, their reproducibility here."""

import pytest
import torch

from spectrim import native
from spectrim.native.products import THREADS_APART, add_resolvents_, gram_matrix
from spectrim.operators import soft_clip

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no kernels: {native.unavailable_because()}")


def test_results_do_not_depend_on_the_number_of_threads():
    X = torch.randn(150, 290)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, THREADS_APART + 1):
            torch.set_num_threads(count)
            gram, root = gram_matrix(X, 2.0).tril(), torch.zeros(150, 150)
            sizes = add_resolvents_(root, gram, [1.0, 2.0, 3.0], [1.0, 5.0, 20.0])
            found.append((gram, root, torch.tensor(sizes)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(mine, its) for mine, its in zip(found[0], other, strict=True))


def test_a_matrix_that_is_not_finite_comes_back_as_such():
    X = torch.randn(200, 300)
    X[7, 9] = torch.nan
    assert not soft_clip(X, 1.0).isfinite().all()
