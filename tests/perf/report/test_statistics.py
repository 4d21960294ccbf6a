"""Medians, spreads and ratios of neighbours, against figures worked out by hand and against scipy."""

import math

import pytest
from scipy import stats

from bdlora_perf.report.statistics import Ratio, log_ratios, mean_ratio, median_interval, spread


def test_spread_by_hand() -> None:
    found = spread([10, 1, 3, 2, 4])
    assert (found.median, found.low, found.high) == (3, 1, 10)
    assert (found.first_quartile, found.third_quartile, found.rounds) == (2, 4, 5)
    assert found.relative_iqr == pytest.approx(2 / 3)
    assert spread([7]).relative_iqr == 0


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        pytest.param([5.0], 5, 5, id="one"),
        pytest.param([3.0, 1.0, 2.0], 1, 3, id="too few for 95%"),
        pytest.param([6.0, 1.0, 2.0, 3.0, 4.0, 5.0], 1, 6, id="six: 96.9%"),
        pytest.param([float(i) for i in range(1, 11)], 2, 9, id="ten: second and ninth, 97.9%"),
    ],
)
def test_median_interval(values: list[float], low: float, high: float) -> None:
    assert median_interval(values) == (low, high)


def test_ratio_of_neighbours_by_hand() -> None:
    """Ratios 2 and 4: their geometric mean is sqrt(8); the logarithms' standard error is ln 2 / 2, and t is 12.706."""
    logs = log_ratios({0: 2.0, 1: 8.0}, {0: 1.0, 1: 2.0}, "higher")
    ratio = mean_ratio([logs])
    assert ratio is not None and ratio.interval is not None
    assert (ratio.value, ratio.rounds) == (pytest.approx(math.sqrt(8)), 2)
    half = 12.7062 * math.log(2) / 2
    assert ratio.interval == pytest.approx((math.sqrt(8) * math.exp(-half), math.sqrt(8) * math.exp(half)), rel=1e-4)


def test_lower_is_better_turns_the_ratio_round() -> None:
    assert mean_ratio([log_ratios({0: 2.0}, {0: 6.0}, "lower")]) == Ratio(pytest.approx(3), None, 1)


def test_drift_that_neighbours_share_is_no_noise() -> None:
    ratio = mean_ratio([log_ratios({0: 2.0, 1: 20.0, 2: 200.0}, {0: 1.0, 1: 10.0, 2: 100.0}, "higher")])
    assert ratio is not None and ratio.interval == pytest.approx((2, 2))


def test_only_rounds_with_both_and_above_zero_count() -> None:
    system = {0: 3.0, 1: 5.0, 2: 0.0, 4: 12.0}
    baseline = {0: 1.0, 2: 1.0, 3: 1.0, 4: 4.0}
    assert log_ratios(system, baseline, "higher") == pytest.approx({0: math.log(3), 4: math.log(3)})
    assert mean_ratio([log_ratios({0: 1.0}, {1: 1.0}, "higher")]) is None


def test_mean_over_points_is_students_t_over_rounds() -> None:
    points = [{0: 0.1, 1: 0.3, 2: 0.2}, {0: 0.5, 1: 0.9, 2: 0.4}]
    ratio = mean_ratio(points)
    by_round = [(0.1 + 0.5) / 2, (0.3 + 0.9) / 2, (0.2 + 0.4) / 2]
    expected = stats.ttest_1samp(by_round, 0).confidence_interval(0.95)
    assert ratio is not None
    assert ratio.value == pytest.approx(math.exp(0.4))
    assert ratio.interval == pytest.approx((math.exp(expected.low), math.exp(expected.high)))


def test_a_round_that_a_point_lacks_counts_for_the_mean_alone() -> None:
    ratio = mean_ratio([{0: 0.1, 1: 0.3}, {0: 0.6}])
    assert ratio == Ratio(pytest.approx(math.exp((0.2 + 0.6) / 2)), None, 1)
