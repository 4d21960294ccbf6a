"""Ratios of neighbours and their intervals, against figures worked out by hand and against scipy."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from bdlora_perf.report.frame import adjust, interval, log_ratios, mean_effect, p_value

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
    effect = mean_effect(logs({0: 2.0, 1: 8.0}, {0: 1.0, 1: 2.0}))
    assert (math.exp(effect.mean()), len(effect)) == (pytest.approx(math.sqrt(8)), 2)
    half = 12.7062 * math.log(2) / 2
    expected = (math.sqrt(8) * math.exp(-half), math.sqrt(8) * math.exp(half))
    assert np.exp(interval(effect)) == pytest.approx(expected, rel=1e-4)


def test_lower_is_better_turns_the_ratio_round() -> None:
    effect = mean_effect(logs({0: 2.0}, {0: 6.0}, "lower"))
    assert [*np.exp(effect)] == pytest.approx([3])
    assert np.isnan(interval(effect)).all()


def test_drift_that_neighbours_share_is_no_noise() -> None:
    effect = mean_effect(logs({0: 2.0, 1: 20.0, 2: 200.0}, {0: 1.0, 1: 10.0, 2: 100.0}))
    assert np.exp(interval(effect)) == pytest.approx((2, 2))


def test_only_rounds_with_both_and_above_zero_count() -> None:
    found = logs({0: 3.0, 1: 5.0, 2: 0.0, 4: 12.0}, {0: 1.0, 2: 1.0, 3: 1.0, 4: 4.0})
    assert dict(zip(found["round"], found.value, strict=True)) == pytest.approx({0: math.log(3), 4: math.log(3)})
    assert mean_effect(logs({0: 1.0}, {1: 1.0})).empty


def test_mean_over_points_is_students_t_over_rounds() -> None:
    points = [[0.1, 0.3, 0.2], [0.5, 0.9, 0.4]]
    effect = mean_effect(logs([dict(enumerate(np.exp(p))) for p in points], [dict.fromkeys(range(3), 1.0)] * 2))
    expected = stats.ttest_1samp(np.mean(points, axis=0), 0).confidence_interval(0.95)
    assert effect.mean() == pytest.approx(0.4)
    assert interval(effect) == pytest.approx((expected.low, expected.high))


def test_a_round_that_a_point_lacks_counts_for_the_mean_alone() -> None:
    points = [{0: math.exp(0.1), 1: math.exp(0.3)}, {0: math.exp(0.6)}]
    effect = mean_effect(logs(points, [{0: 1.0, 1: 1.0}, {0: 1.0}]))
    assert [*effect] == pytest.approx([(0.2 + 0.6) / 2])
    # With one more round that both have, there is an interval, of what these differ by.
    points = [{**points[0], 2: math.exp(0.5)}, {**points[1], 2: math.exp(0.8)}]
    effect = mean_effect(logs(points, [dict.fromkeys(range(3), 1.0)] * 2))
    assert [*effect] == pytest.approx([0.5 - 0.15, 0.5 + 0.15])


def test_where_no_round_has_all_points_there_is_a_mean_but_no_interval() -> None:
    effect = mean_effect(logs([{0: math.exp(0.1)}, {1: math.exp(0.6)}], [{0: 1.0}, {1: 1.0}]))
    assert [*effect] == pytest.approx([0.35])


def test_p_values_of_a_family() -> None:
    """By hand: 0.01, 0.02 and 0.4 of three tests are 0.03, 0.03 and 0.4; what was not tested does not count."""
    assert adjust([0.4, np.nan, 0.01, 0.02]) == pytest.approx([0.4, np.nan, 0.03, 0.03], nan_ok=True)
    assert np.isnan(p_value(pd.Series([0.1, 0.1]))) and adjust([np.nan]) == pytest.approx([np.nan], nan_ok=True)
    values = pd.Series([0.3, 0.1, 0.4])
    assert p_value(values) == pytest.approx(stats.ttest_rel(values, [0, 0, 0]).pvalue)
