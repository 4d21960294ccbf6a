"""The figures of a report as one long pandas frame, and the statistics of its rows."""

from collections.abc import Collection, Iterable
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

from bdlora_perf.report.schema import Point, Report, Value
from bdlora_perf.report.words import describe
from bdlora_sglang.errors import BDLoRAError

CONFIDENCE = 0.95


def differences(rows: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """The rows of the other systems; ``value`` is how much more each has than its neighbour, the baseline.

    Args:
        rows: of one metric, with the columns of `Results.frame`. What lacks the baseline in its round is left out.
    """
    own = rows[rows.system == baseline][["point", "round", "value"]]
    pairs = rows[rows.system != baseline].merge(own, on=["point", "round"], suffixes=("", "_of_baseline"))
    return pairs.assign(value=pairs.value - pairs.value_of_baseline)


def log_ratios(rows: pd.DataFrame, baseline: str, better: Literal["higher", "lower"] | None) -> pd.DataFrame:
    """`differences` of logarithms: ``value`` is that of how many times better a system is than the baseline.

    A round in which one of the two is not positive has no ratio, nor has a metric without a better direction.
    """
    rows = rows[rows.value > 0] if better else rows[:0]
    return differences(rows.assign(value=np.log(rows.value) * (1 if better == "higher" else -1)), baseline)


def by_round(rows: pd.DataFrame) -> pd.Series:
    """The mean over all points of one system's values in each round that none of its points lacks."""
    means = rows.groupby("round").value.agg(["mean", "size"])
    return means["mean"][means["size"] == rows.point.nunique()]


def mean_effect(rows: pd.DataFrame) -> pd.Series:
    """`by_round` of one system's `differences`: what varies from run to run, not how the points differ.

    A round that a point lacks counts for the mean alone: all are moved so that their mean is that over the points, of
    the means over each point's rounds. Where no round has all points, that mean stands for them.
    """
    rounds, mean = by_round(rows), rows.groupby("point").value.mean().mean()
    return rounds - rounds.mean() + mean if len(rounds) or rows.empty else pd.Series([mean])


def interval(values: pd.Series) -> tuple[float, float]:
    """Student's t interval of the mean; NaN with fewer than two values."""
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * values.sem()
    return values.mean() - half, values.mean() + half


def p_value(values: pd.Series) -> float:
    """Of the t-test that the mean is 0; NaN where nothing varies."""
    return float(stats.ttest_1samp(values, 0).pvalue) if values.nunique() > 1 else np.nan


def adjust(p_values: np.ndarray) -> np.ndarray:
    """The p-values of one family of tests after Benjamini and Hochberg; NaN, where nothing was tested, stays."""
    adjusted = np.array(p_values, float)
    tested = ~np.isnan(adjusted)
    adjusted[tested] = stats.false_discovery_control(adjusted[tested])
    return adjusted


def _described(kind: str, described: Iterable[str], used: Collection[str]) -> tuple[str, ...]:
    names = tuple(described)
    unknown = sorted(set(used) - set(names))
    if unknown:
        raise BDLoRAError(f"samples: found the {kind} '{unknown[0]}', expected one that the report describes: {names}")
    return tuple(name for name in names if name in used)


class Results:
    """What every table and plot asks of a report.

    ``frame`` has one row a figure: system, metric, round, value, the number of its point, and a column for each
    dimension (None where a point lacks it). ``points`` are sorted: numbers by size, names by first appearance.
    ``varying`` are the dimensions with more than one value, ``fixed`` the others; ``systems`` and ``metrics`` those
    that were measured, in the report's order.

    Raises:
        BDLoRAError: two samples of one system at one point in one round, or a name that the report does not describe.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        values: dict[str, dict[Value, None]] = {}
        for sample in report.samples:
            for name, value in sample.point.items():
                values.setdefault(name, {})[value] = None
        order = {
            name: [*sorted(v for v in found if isinstance(v, (int, float))), None, *found]
            for name, found in values.items()
        }
        distinct = {frozenset(sample.point.items()): sample.point for sample in report.samples if sample.metrics}
        self.points: list[Point] = sorted(
            distinct.values(), key=lambda point: [order[name].index(point.get(name)) for name in order]
        )
        numbers = {frozenset(point.items()): i for i, point in enumerate(self.points)}
        rows = [
            (sample.system, metric, numbers[frozenset(sample.point.items())], sample.round, value)
            for sample in report.samples
            for metric, value in sample.metrics.items()
        ]
        frame = pd.DataFrame(rows, columns=["system", "metric", "point", "round", "value"]).astype({"value": float})
        twice = frame[frame.duplicated(["system", "metric", "point", "round"])]
        if len(twice):
            first = twice.iloc[0]
            raise BDLoRAError(
                f"samples: found two of system '{first.system}' at {describe(self.points[first.point])} in round "
                f"{first['round']}, expected one"
            )
        self.systems = _described("system", report.systems, set(frame.system))
        self.metrics = _described("metric", report.metrics, set(frame.metric))
        _described("baseline", report.systems, report.baselines)
        self.varying = tuple(name for name in values if len({point.get(name) for point in self.points}) > 1)
        self.fixed = {name: next(iter(found)) for name, found in values.items() if name not in self.varying}
        dimensions = pd.DataFrame(
            [[point.get(name) for name in values] for point in self.points], columns=[*values], dtype=object
        )
        self.frame = frame.join(dimensions, on="point").sort_values("point", kind="stable")

    def rows(self, metric: str) -> pd.DataFrame:
        """The rows of a metric."""
        return self.frame[self.frame.metric == metric]

    def dimensions(self, rows: pd.DataFrame) -> list[str]:
        """Of the varying dimensions those that one of the rows has."""
        return [name for name in self.varying if rows[name].notna().any()]

    def logs(self, metric: str, baseline: str) -> pd.DataFrame:
        """`log_ratios` of a metric."""
        return log_ratios(self.rows(metric), baseline, self.report.metrics[metric].better)

    def labels(self, rows: pd.DataFrame) -> dict[str, str]:
        """By name, of the systems that have one of the rows, in the report's order."""
        return {name: self.report.systems[name].label for name in self.systems if (rows.system == name).any()}

    def groups(self, points: Iterable[int], dimensions: Iterable[str]) -> list[tuple[Point, list[int]]]:
        """The points that agree on ``dimensions``, after what they agree on; those that do not vary are dropped."""
        names = [name for name in dimensions if name in self.varying]
        found: dict[frozenset[tuple[str, Value]], tuple[Point, list[int]]] = {}
        for number in sorted(points):
            key = {name: self.points[number][name] for name in names if name in self.points[number]}
            found.setdefault(frozenset(key.items()), (key, []))[1].append(number)
        return list(found.values())
