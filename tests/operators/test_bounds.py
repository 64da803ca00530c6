"""The bounds hold for every matrix, and are met where they are said to be tight."""

import pytest
import torch
from hypothesis import given, settings

import oracle
import spectra
from spectrim.operators import entry_bound, frobenius_bound, spectral_norm_bound, sum_bound


@settings(max_examples=60, deadline=None)
@given(spectra.matrices())
def test_no_bound_is_below_the_largest_singular_value(X):
    for bound in (entry_bound, frobenius_bound, sum_bound, spectral_norm_bound):
        assert bound(X).shape == X.shape[:-2]
        assert (bound(X).double() >= oracle.norm(X) * (1 - 1e-6)).all()


def test_each_bound_is_tight_where_it_says_so():
    ones = torch.ones(5, 7)
    assert entry_bound(ones).item() == pytest.approx(35**0.5)
    rank_one = torch.outer(torch.randn(5), torch.randn(7))
    assert frobenius_bound(rank_one).item() == pytest.approx(oracle.norm(rank_one).item(), rel=1e-5)
    assert sum_bound(torch.eye(6)).item() == 1.0
    assert spectral_norm_bound(torch.eye(6)).item() == 1.0


def test_large_entries_do_not_overflow_the_norm():
    assert frobenius_bound(torch.full((2, 2), 1e30)).item() == pytest.approx(2e30)
    assert torch.equal(spectral_norm_bound(torch.zeros(2, 3, 4)), torch.zeros(2))
