"""Ratios of neighbours and their intervals, against figures worked out by hand and against scipy."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from bdlora_perf.report.frame import Ratio, log_ratios, mean_ratio

Rounds = Mapping[int, float]


def logs(
    system: Sequence[Rounds] | Rounds, baseline: Sequence[Rounds] | Rounds, better: str = "higher"
) -> pd.DataFrame:
    """Log-ratios of rounds at one point, or at several."""
    rows = [
        (name, point, number, value)
        for name, points in (("s", system), ("b", baseline))
        for point, rounds in enumerate([points] if isinstance(points, Mapping) else points)
        for number, value in rounds.items()
    ]
    frame = pd.DataFrame(rows, columns=["system", "point", "round", "value"])
    return log_ratios(frame, "b", better)  # type: ignore[arg-type]


def test_ratio_of_neighbours_by_hand() -> None:
    """Ratios 2 and 4: their geometric mean is sqrt(8); the logarithms' standard error is ln 2 / 2, and t is 12.706."""
    ratio = mean_ratio(logs({0: 2.0, 1: 8.0}, {0: 1.0, 1: 2.0}))
    assert ratio is not None and ratio.interval is not None
    assert (ratio.value, ratio.rounds) == (pytest.approx(math.sqrt(8)), 2)
    half = 12.7062 * math.log(2) / 2
    assert ratio.interval == pytest.approx((math.sqrt(8) * math.exp(-half), math.sqrt(8) * math.exp(half)), rel=1e-4)


def test_lower_is_better_turns_the_ratio_round() -> None:
    assert mean_ratio(logs({0: 2.0}, {0: 6.0}, "lower")) == Ratio(pytest.approx(3), None, 1)


def test_drift_that_neighbours_share_is_no_noise() -> None:
    ratio = mean_ratio(logs({0: 2.0, 1: 20.0, 2: 200.0}, {0: 1.0, 1: 10.0, 2: 100.0}))
    assert ratio is not None and ratio.interval == pytest.approx((2, 2))


def test_only_rounds_with_both_and_above_zero_count() -> None:
    found = logs({0: 3.0, 1: 5.0, 2: 0.0, 4: 12.0}, {0: 1.0, 2: 1.0, 3: 1.0, 4: 4.0})
    assert dict(zip(found["round"], found.log, strict=True)) == pytest.approx({0: math.log(3), 4: math.log(3)})
    assert mean_ratio(logs({0: 1.0}, {1: 1.0})) is None


def test_mean_over_points_is_students_t_over_rounds() -> None:
    points = [[0.1, 0.3, 0.2], [0.5, 0.9, 0.4]]
    ratio = mean_ratio(logs([dict(enumerate(np.exp(p))) for p in points], [dict.fromkeys(range(3), 1.0)] * 2))
    expected = stats.ttest_1samp(np.mean(points, axis=0), 0).confidence_interval(0.95)
    assert ratio is not None
    assert ratio.value == pytest.approx(math.exp(0.4))
    assert ratio.interval == pytest.approx((math.exp(expected.low), math.exp(expected.high)))


def test_a_round_that_a_point_lacks_counts_for_the_mean_alone() -> None:
    ratio = mean_ratio(logs([{0: math.exp(0.1), 1: math.exp(0.3)}, {0: math.exp(0.6)}], [{0: 1.0, 1: 1.0}, {0: 1.0}]))
    assert ratio == Ratio(pytest.approx(math.exp((0.2 + 0.6) / 2)), None, 1)
