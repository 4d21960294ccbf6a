"""Differences to a baseline within rounds, with intervals and paired tests."""

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import pandas as pd
from scipy import stats

from bdlora_perf.report.frame import CONFIDENCE, Results, count_rounds, describe, label_with_unit
from bdlora_perf.report.schema import Point
from bdlora_perf.report.tables import Table, point_cells, point_columns

_MISSING = "-"
_TESTED = (
    f"in brackets the {CONFIDENCE:.0%} interval of the paired difference (Student's t) and p of the paired t-test, "
    "adjusted over the table's {over} (Benjamini and Hochberg). Means over points are those over the points that a "
    "system shares with the baseline."
)
_Key = TypeVar("_Key")


def paired_tables(results: Results, metrics: tuple[str, ...], grouped_by: tuple[str, ...] = ()) -> list[Table]:
    """For each of ``metrics`` and baseline: system minus baseline at every point, and the mean over all of them.

    Before it, where there are several groups of points that agree on the dimensions ``grouped_by``: the means of each.
    """
    return [
        table
        for metric in metrics
        if metric in results.metrics
        for baseline in results.report.baselines
        if len(pairs := paired_differences(results, metric, baseline))
        for table in _tables(results, metric, baseline, pairs, grouped_by)
    ]


def paired_differences(results: Results, metric: str, baseline: str) -> pd.DataFrame:
    """Per system, point and round the column ``difference``: the system's value minus the baseline's."""
    rows = results.rows(metric)
    own = rows[rows.system == baseline][["point", "round", "value"]]
    pairs = rows[rows.system != baseline].merge(own, on=["point", "round"], suffixes=("", "_of_baseline"))
    return pairs.assign(difference=(pairs.value - pairs.value_of_baseline).astype(float))


def _tables(
    results: Results, metric: str, baseline: str, pairs: pd.DataFrame, grouped_by: tuple[str, ...]
) -> list[Table]:
    labels = {name: results.report.systems[name].label for name in results.systems if (pairs.system == name).any()}
    metric_label = label_with_unit(results.report.metrics[metric])
    title = f"{metric_label}: difference to {results.report.systems[baseline].label}"
    better = {"higher": "More than 0 is better. ", "lower": "Less than 0 is better. ", None: ""}
    by_point = {key: [*rows.difference] for key, rows in pairs.groupby(["point", "system"])}
    caption = f"{better[results.report.metrics[metric].better]}Means of {count_rounds(map(len, by_point.values()))}"
    overall = {name: _means(pairs[pairs.system == name]) for name in labels}
    points = sorted(set(pairs.point))
    groups = results.groups(points, grouped_by)
    tables = [_each_point(results, title, labels, points, by_point, overall, caption)]
    if 1 < len(groups) < len(points):
        tables.insert(0, _each_group(f"{title}, means over points", labels, groups, pairs, overall, caption))
    return tables


def _each_point(
    results: Results,
    title: str,
    labels: Mapping[str, str],
    points: Sequence[int],
    by_point: Mapping[tuple[int, str], list[float]],
    overall: Mapping[str, list[float]],
    caption: str,
) -> Table:
    """One column a system, one row a point."""
    names = [name for name in results.varying if any(name in results.points[number] for number in points)]
    adjusted = _adjusted(by_point)
    rows = [
        (
            *point_cells(results.points[number], names),
            *(_cell(by_point.get((number, name), []), adjusted.get((number, name))) for name in labels),
        )
        for number in points
    ]
    if len(rows) > 1:
        rows.append(("mean over all", *[""] * (len(names) - 1), *(_cell(v, _p_value(v)) for v in overall.values())))
    columns = (*point_columns(names), *labels.values())
    return Table(title, columns, tuple(rows), max(1, len(names)), f"{caption}; {_TESTED.format(over='points')}")


def _each_group(
    title: str,
    labels: Mapping[str, str],
    groups: Sequence[tuple[Point, list[int]]],
    pairs: pd.DataFrame,
    overall: Mapping[str, list[float]],
    caption: str,
) -> Table:
    """One column a group of points, one row a system."""
    means = {
        (name, i): _means(pairs[(pairs.system == name) & pairs.point.isin(points)])
        for name in labels
        for i, (_, points) in enumerate(groups)
    }
    adjusted = _adjusted(means)
    rows = tuple(
        (
            label,
            *(_cell(means[name, i], adjusted.get((name, i))) for i in range(len(groups))),
            _cell(overall[name], _p_value(overall[name])),
        )
        for name, label in labels.items()
    )
    columns = ("", *(describe(group) for group, _ in groups), "all")
    return Table(title, columns, rows, 1, f"{caption}; {_TESTED.format(over='cells but those of all')}")


def _means(pairs: pd.DataFrame) -> list[float]:
    """By round, of the rounds that no point lacks."""
    means = pairs.groupby("round").difference.agg(["mean", "size"])
    return [*means["mean"][means["size"] == pairs.point.nunique()]]


def _p_value(values: list[float]) -> float | None:
    """Of the paired t-test; None where nothing varies."""
    varies = len(values) > 1 and max(values) > min(values)
    return float(stats.ttest_1samp(values, 0).pvalue) if varies else None


def _adjusted(cells: Mapping[_Key, list[float]]) -> dict[_Key, float]:
    """One family of tests. Means over all of the cells are not in it: they hold the same figures again."""
    p_values = {key: p for key, values in cells.items() if (p := _p_value(values)) is not None}
    return dict(zip(p_values, stats.false_discovery_control([*p_values.values()]) if p_values else [], strict=True))


def _cell(values: list[float], p_value: float | None) -> str:
    if not values:
        return _MISSING
    mean = sum(values) / len(values)
    if p_value is None or math.isnan(p_value):
        return f"{mean:+.4f}"
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values)
    p = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
    return f"{mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f}, {p})"
