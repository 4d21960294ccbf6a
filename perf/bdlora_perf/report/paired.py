"""Differences to a baseline within rounds, with intervals and paired tests."""

import math

import pandas as pd
from scipy import stats

from bdlora_perf.report.frame import CONFIDENCE, Results, count_rounds, describe, label_with_unit
from bdlora_perf.report.tables import Table, point_cells, point_columns

_MISSING = "-"


def paired_tables(results: Results, metrics: tuple[str, ...], grouped_by: tuple[str, ...] = ()) -> list[Table]:
    """For each of ``metrics`` and baseline: system minus baseline at every point, and means over points.

    The means are those over the points that agree on the dimensions ``grouped_by``, and over all.
    """
    return [
        _table(results, metric, baseline, pairs, grouped_by)
        for metric in metrics
        if metric in results.metrics
        for baseline in results.report.baselines
        if len(pairs := paired_differences(results, metric, baseline))
    ]


def paired_differences(results: Results, metric: str, baseline: str) -> pd.DataFrame:
    """Per system, point and round the column ``difference``: the system's value minus the baseline's."""
    rows = results.rows(metric)
    own = rows[rows.system == baseline][["point", "round", "value"]]
    pairs = rows[rows.system != baseline].merge(own, on=["point", "round"], suffixes=("", "_of_baseline"))
    return pairs.assign(difference=(pairs.value - pairs.value_of_baseline).astype(float))


def _table(results: Results, metric: str, baseline: str, pairs: pd.DataFrame, grouped_by: tuple[str, ...]) -> Table:
    systems = [name for name in results.systems if (pairs.system == name).any()]
    names = [name for name in results.varying if pairs[name].notna().any()]
    by_point = {key: [*rows.difference] for key, rows in pairs.groupby(["point", "system"])}
    # One family of tests: every cell of the table but the means, which hold the same figures again.
    p_values = {key: stats.ttest_1samp(values, 0).pvalue for key, values in by_point.items() if _varies(values)}
    adjusted = dict(zip(p_values, stats.false_discovery_control([*p_values.values()]) if p_values else [], strict=True))
    rows = [
        (
            *point_cells(results.points[number], names),
            *(_cell(by_point.get((number, name), []), adjusted.get((number, name))) for name in systems),
        )
        for number in sorted(set(pairs.point))
    ]
    if len(rows) > 1:
        groups = results.groups(set(pairs.point), grouped_by)
        several = groups if 1 < len(groups) < len(rows) else []
        for group, points in [*several, ({}, [*pairs.point])]:
            means = (_means(pairs[(pairs.system == name) & pairs.point.isin(points)]) for name in systems)
            cells = (_cell(v, stats.ttest_1samp(v, 0).pvalue if _varies(v) else None) for v in means)
            title = f"mean over {describe(group) if group else 'all'}"
            rows.append((title, *[""] * (len(names) - 1), *cells))
    described = results.report.metrics[metric]
    better = {"higher": "More than 0 is better. ", "lower": "Less than 0 is better. ", None: ""}[described.better]
    caption = (
        f"{better}Means of {count_rounds(map(len, by_point.values()))}; in brackets the {CONFIDENCE:.0%} interval of "
        "the paired difference (Student's t) and p of the paired t-test, adjusted over the table's points (Benjamini "
        "and Hochberg). Means are those over the points that a system shares with the baseline, their p as it is."
    )
    title = f"{label_with_unit(described)}: difference to {results.report.systems[baseline].label}"
    columns = (*point_columns(names), *(results.report.systems[name].label for name in systems))
    return Table(title, columns, tuple(rows), max(1, len(names)), caption)


def _means(pairs: pd.DataFrame) -> list[float]:
    """By round, of the rounds that no point lacks."""
    means = pairs.groupby("round").difference.agg(["mean", "size"])
    return [*means["mean"][means["size"] == pairs.point.nunique()]]


def _varies(values: list[float]) -> bool:
    return len(values) > 1 and max(values) > min(values)


def _cell(values: list[float], p_value: float | None) -> str:
    if not values:
        return _MISSING
    mean = sum(values) / len(values)
    if p_value is None or math.isnan(p_value):
        return f"{mean:+.4f}"
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values)
    p = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
    return f"{mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f}, {p})"
