"""Medians with their spread, and ratios of neighbours with their confidence intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """One metric of one system at one point over its rounds; the quartiles are linearly interpolated."""

    median: float
    low: float
    high: float
    first_quartile: float
    third_quartile: float
    rounds: int

    @property
    def relative_iqr(self) -> float:
        """Interquartile range over the median's magnitude; 0 where nothing varies."""
        width = self.third_quartile - self.first_quartile
        return width / abs(self.median) if self.median else math.inf if width else 0.0


@dataclass(frozen=True)
class Ratio:
    """A speed-up: more than 1 is better than the baseline. No ``interval`` with fewer than two ``rounds``."""

    value: float
    interval: tuple[float, float] | None
    rounds: int


def spread(values: Sequence[float]) -> Spread:
    """Median, extremes and quartiles of at least one value."""
    low, first, median, third, high = map(float, np.quantile(values, (0, 0.25, 0.5, 0.75, 1)))
    return Spread(median, low, high, first, third, len(values))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the median lies, free of any distribution: the two order statistics that enclose it with 95% confidence.

    Fewer than six values cannot give that confidence (five give 93.75%, three 75%): then smallest to largest.
    """
    interval = stats.quantile_test(list(values), p=0.5).confidence_interval(CONFIDENCE)
    low, high = float(interval.low), float(interval.high)
    return min(values) if math.isnan(low) else low, max(values) if math.isnan(high) else high


def log_ratios(
    system: Mapping[int, float], baseline: Mapping[int, float], better: Literal["higher", "lower"]
) -> dict[int, float]:
    """Per round the logarithm of how many times better the system is than its neighbour, the baseline.

    A round that lacks either of the two, or in which one is not positive, has no ratio and is left out.
    """
    sign = 1 if better == "higher" else -1
    return {
        number: sign * math.log(value / baseline[number])
        for number, value in sorted(system.items())
        if number in baseline and value > 0 and baseline[number] > 0
    }


def mean_ratio(points: Sequence[Mapping[int, float]]) -> Ratio | None:
    """Geometric mean over points of the ratios of neighbours, each `log_ratios` of one point; None without any.

    The value at one point is the geometric mean over its rounds. The interval is Student's t on the logarithms of the
    rounds that all points share, each round's being the mean over the points: it holds what varies from run to run,
    not how the points differ.
    """
    measured = [logs for logs in points if logs]
    if not measured:
        return None
    center = fmean(fmean(logs.values()) for logs in measured)
    shared = sorted(set.intersection(*(set(logs) for logs in measured)))
    by_round = [fmean(logs[number] for logs in measured) for number in shared]
    interval = None
    if len(by_round) >= 2:
        t = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(by_round) - 1))
        half = t * stdev(by_round) / math.sqrt(len(by_round))
        interval = math.exp(center - half), math.exp(center + half)
    return Ratio(math.exp(center), interval, len(by_round))
