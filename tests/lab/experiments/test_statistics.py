import pytest
from scipy import stats

from spectrim.lab.experiments.statistics import paired_difference


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    mine, theirs = {0: 3.1, 1: 3.4, 2: 3.0, 7: 3.3}, {0: 3.3, 1: 3.5, 2: 3.4, 7: 3.35}
    found = paired_difference(mine, theirs)
    expected = stats.ttest_rel(list(mine.values()), list(theirs.values())).confidence_interval(0.95)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx(-0.1875)
    assert found.pairs == 4


def test_seeds_are_paired_by_their_number_not_their_place() -> None:
    found = paired_difference({0: 1.0, 1: 2.0}, {1: 2.5, 0: 1.5})
    assert found is not None
    assert (found.mean, found.low, found.high) == (-0.5, -0.5, -0.5)


def test_one_seed_has_a_difference_and_no_interval() -> None:
    found = paired_difference({3: 1.0}, {3: 1.5})
    assert found is not None
    assert (found.mean, found.low, found.pairs) == (-0.5, None, 1)


@pytest.mark.parametrize(("mine", "theirs"), [({0: None}, {0: 1.0}), ({0: 1.0}, {1: 1.0}), ({}, {})])
def test_survivors_alone_are_not_compared(mine: dict[int, float | None], theirs: dict[int, float | None]) -> None:
    assert paired_difference(mine, theirs) is None
