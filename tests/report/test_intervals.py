from itertools import product
from statistics import mean, stdev

import pytest
from scipy.stats import binom, binomtest

from lowcal.report.intervals import difference_interval, of_two, spread_notes, wilson, with_spread


@pytest.mark.parametrize(("wrong", "images"), [(0, 100), (3, 100), (50, 449), (449, 449), (600, 10_000)])
def test_wilson_is_scipys(wrong, images):
    expected = binomtest(wrong, images).proportion_ci(method="wilson")
    assert wilson(100 * wrong / images, images) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-4)


@pytest.mark.parametrize(("error", "baseline"), [(0.1, 0.1), (0.3, 0.2), (0.05, 0.02)])
def test_the_interval_of_a_difference_covers_it_in_about_95_of_100_cases(error, baseline):
    images, covered = 60, 0.0
    for wrong, base in product(range(images + 1), repeat=2):
        low, high = difference_interval(100 * wrong / images, 100 * base / images, images)
        if low <= 100 * (error - baseline) <= high:
            covered += binom.pmf(wrong, images, error) * binom.pmf(base, images, baseline)
    assert 0.94 <= covered <= 0.99


def test_the_two_seeds_values_come_back():
    values = [9.25, 10.5]
    assert of_two(mean(values), stdev(values)) == pytest.approx(values)
    assert with_spread(mean(values), stdev(values), 2, 2, "×") == "9.88× (9.25 to 10.50)"


def test_spreads_for_reading():
    assert with_spread(None, None, 1, 2) == "–"
    assert with_spread(9.5, None, 1, 2, " s") == "9.50 s"
    assert with_spread(9.5, 0.3, 3, 2) == "9.50 ± 0.30"
    assert spread_notes([1, 1]) == []
    assert len(spread_notes([1, 2])) == len(spread_notes([3, 1])) == 1
    assert len(spread_notes([2, 3])) == 2
