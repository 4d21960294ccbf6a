"""The figures of a report as one long pandas frame, and the statistics of its rows."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

from bdlora_perf.report.schema import Metric, Point, Report, Value
from bdlora_sglang.errors import BDLoRAError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """A speed-up: more than 1 is better than the baseline. No ``interval`` with fewer than two ``rounds``."""

    value: float
    interval: tuple[float, float] | None
    rounds: int


def log_ratios(rows: pd.DataFrame, baseline: str, better: Literal["higher", "lower"]) -> pd.DataFrame:
    """Per system, point and round the logarithm of how many times better it is than its neighbour, the baseline.

    Args:
        rows: of one metric, with the columns of `Results.frame`. A round that lacks the baseline, or in which one of
            the two is not positive, has no ratio.
    """
    rows = rows[rows.value > 0]
    own = rows[rows.system == baseline][["point", "round", "value"]]
    pairs = rows[rows.system != baseline].merge(own, on=["point", "round"], suffixes=("", "_of_baseline"))
    sign = 1 if better == "higher" else -1
    return pairs.assign(log=sign * np.log((pairs.value / pairs.value_of_baseline).astype(float)))


def by_round(logs: pd.DataFrame) -> pd.Series:
    """The mean over all points of one system's log-ratios in each round that none of its points lacks."""
    means = logs.groupby("round").log.agg(["mean", "size"])
    return means["mean"][means["size"] == logs.point.nunique()]


def interval(logs: Sequence[float]) -> tuple[float, float]:
    """Student's t interval of the mean of at least two logarithms, as factors."""
    center, half = np.mean(logs), stats.t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1) * stats.sem(logs)
    return float(np.exp(center - half)), float(np.exp(center + half))


def mean_ratio(logs: pd.DataFrame) -> Ratio | None:
    """Geometric mean over points of one system's ratios (`log_ratios`); None without any.

    The value at one point is the geometric mean over its rounds. The interval is of the rounds that all points share:
    it holds what varies from run to run, not how the points differ.
    """
    if logs.empty:
        return None
    rounds = by_round(logs)
    center = logs.groupby("point").log.mean().mean()
    bounds = None
    if len(rounds) >= 2:
        shift = float(np.exp(center - rounds.mean()))
        low, high = interval(rounds)
        bounds = low * shift, high * shift
    return Ratio(float(np.exp(center)), bounds, len(rounds))


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
        order = {name: {value: i for i, value in enumerate(found)} for name, found in values.items()}

        def place(point: Point) -> list[tuple[int, float]]:
            found = ((name, point.get(name)) for name in order)
            return [(0, v) if isinstance(v, (int, float)) else (1, order[name].get(v, -1)) for name, v in found]

        distinct = {frozenset(sample.point.items()): sample.point for sample in report.samples if sample.metrics}
        self.points: list[Point] = sorted(distinct.values(), key=place)
        numbers = {frozenset(point.items()): i for i, point in enumerate(self.points)}
        rows = [
            (sample.system, metric, numbers[frozenset(sample.point.items())], sample.round, value)
            for sample in report.samples
            for metric, value in sample.metrics.items()
        ]
        frame = pd.DataFrame(rows, columns=["system", "metric", "point", "round", "value"])
        self._refuse_twice(frame)
        self.systems = _described("system", report.systems, set(frame.system))
        self.metrics = _described("metric", report.metrics, set(frame.metric))
        _described("baseline", report.systems, report.baselines)
        self.varying = tuple(name for name in values if len({point.get(name) for point in self.points}) > 1)
        self.fixed = {name: next(iter(found)) for name, found in values.items() if name not in self.varying}
        dimensions = pd.DataFrame(
            [[point.get(name) for name in values] for point in self.points], columns=[*values], dtype=object
        )
        self.frame = frame.join(dimensions, on="point").sort_values("point", kind="stable")

    def _refuse_twice(self, frame: pd.DataFrame) -> None:
        twice = frame[frame.duplicated(["system", "metric", "point", "round"])]
        if len(twice):
            first = twice.iloc[0]
            raise BDLoRAError(
                f"samples: found two of system '{first.system}' at {describe(self.points[first.point])} in round "
                f"{first['round']}, expected one"
            )

    def rows(self, metric: str, systems: Collection[str] | None = None) -> pd.DataFrame:
        """The rows of a metric, of some systems or all."""
        rows = self.frame[self.frame.metric == metric]
        return rows if systems is None else rows[rows.system.isin(systems)]

    def dimensions(self, rows: pd.DataFrame) -> list[str]:
        """Of the varying dimensions those that one of the rows has."""
        return [name for name in self.varying if rows[name].notna().any()]

    def logs(self, metric: str, baseline: str) -> pd.DataFrame:
        """`log_ratios` of a metric; empty where it has no better direction."""
        better = self.report.metrics[metric].better
        rows = self.rows(metric)
        return log_ratios(rows if better else rows[:0], baseline, better or "higher")

    def groups(self, points: Iterable[int], dimensions: Iterable[str]) -> list[tuple[Point, list[int]]]:
        """The points that agree on ``dimensions``, after what they agree on; those that do not vary are dropped."""
        names = [name for name in dimensions if name in self.varying]
        found: dict[frozenset[tuple[str, Value]], tuple[Point, list[int]]] = {}
        for number in sorted(points):
            key = {name: self.points[number][name] for name in names if name in self.points[number]}
            found.setdefault(frozenset(key.items()), (key, []))[1].append(number)
        return list(found.values())


def describe(point: Mapping[str, Value], dimensions: Iterable[str] | None = None) -> str:
    """A point in words, e.g. ``concurrency 8, uniform``: names stand for themselves."""
    names = sorted(point) if dimensions is None else [name for name in dimensions if name in point]
    words = [v if isinstance(v := point[name], str) else f"{spaced(name)} {format_value(v)}" for name in names]
    return ", ".join(words) or "all points"


def label_with_unit(metric: Metric) -> str:
    return f"{metric.label} [{metric.unit}]" if metric.unit else metric.label


def spaced(name: str) -> str:
    """A dimension, setting or detail in words."""
    return name.replace("_", " ")


def count_rounds(counts: Iterable[int]) -> str:
    """How many rounds stand behind some figures, e.g. ``3 rounds`` or ``2 to 3 rounds``."""
    found = sorted(set(counts))
    if found == [1]:
        return "1 round"
    return f"{found[0]} rounds" if len(found) == 1 else f"{found[0]} to {found[-1]} rounds"


def format_value(value: Value) -> str:
    """A setting or a dimension: exactly what it is."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    return str(value)


def format_number(value: float) -> str:
    """A measured figure: four significant digits, all digits of whole numbers."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.4g}"
