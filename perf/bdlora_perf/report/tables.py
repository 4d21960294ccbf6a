"""The tables of a report's pages: every figure is worked out and formatted here, once for all templates."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd

from bdlora_perf.report.frame import CONFIDENCE, Results, adjust, differences, interval, mean_effect, p_value
from bdlora_perf.report.kinds import LAYOUTS
from bdlora_perf.report.schema import Metric, Point, Report
from bdlora_perf.report.words import count_rounds, describe, format_number, format_value, label_with_unit, spaced

# By group of points and system: what `mean_effect` finds, empty where there is nothing.
_Effects = Sequence[Sequence[pd.Series]]
_Cells = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Table:
    """Formatted cells. The first ``texts`` columns hold text, the others figures."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: int
    caption: str = ""

    @property
    def folded(self) -> bool:
        """Away, for it has more rows than a reader takes in at a glance."""
        return len(self.rows) > 24


def run_table(report: Report) -> Table:
    """What ran, when, and on what."""
    machine = report.machine
    gpus = {name: machine.gpus.count(name) for name in dict.fromkeys(machine.gpus)}
    rows = {
        "Command": report.command,
        "Started": f"{report.started}, took {format_number(round(report.seconds, 1))} s",
        "Seed": str(report.seed),
        "Processor": f"{machine.processor}, {machine.cores} cores, {format_number(machine.memory_gib)} GiB of memory",
        "GPUs": ", ".join(f"{count} x {name}" for name, count in gpus.items()) or "none",
        "System": machine.system,
        "Versions": ", ".join(f"{name} {version}" for name, version in machine.versions.items()),
    }
    return Table("Machine and command", ("", ""), tuple(rows.items()), texts=2)


def settings_table(results: Results) -> Table:
    """The settings that all systems and points share."""
    settings = {**results.report.settings, **results.fixed}
    rows = tuple((spaced(name), format_value(value)) for name, value in settings.items())
    return Table("Settings", ("setting", "value"), rows, texts=2)


def systems_table(report: Report) -> Table:
    """One column a system, one row a detail."""
    systems = report.systems.values()
    details = dict.fromkeys(name for system in systems for name in system.details)
    rows = tuple((spaced(name), *(format_value(system.details.get(name)) for system in systems)) for name in details)
    columns = ("", *(system.label for system in systems))
    return Table("", columns, rows, texts=len(columns))


def speed_up_tables(results: Results) -> list[Table]:
    """For each headline and baseline: geometric means over groups of points, and every point."""
    headlines = [name for name in results.metrics if name in LAYOUTS[results.report.kind].headlines]
    tables = []
    for metric, baseline in product(headlines, results.report.baselines):
        described = results.report.metrics[metric]
        logs = results.logs(metric, baseline)
        for grouped, points, effects in _mean_effects(results, logs):
            title = f"Speed-up over {results.report.systems[baseline].label}: {described.label}"
            title += ", geometric means" if grouped else ""
            cells = [[*map(format_ratio, row)] for row in effects]
            content = _by_point(results, points, results.labels(logs).values(), cells, "geometric mean")
            tables.append(Table(title, *content, _speed_up_caption(described, effects)))
    return tables


def paired_tables(results: Results) -> list[Table]:
    """For each tested metric and baseline: system minus baseline, means over groups of points, and at every point."""
    tested = [name for name in LAYOUTS[results.report.kind].paired if name in results.metrics]
    tables = []
    for metric, baseline in product(tested, results.report.baselines):
        described = results.report.metrics[metric]
        pairs = differences(results.rows(metric), baseline)
        labels = results.labels(pairs).values()
        for grouped, points, effects in _mean_effects(results, pairs):
            title = f"{label_with_unit(described)}: difference to {results.report.systems[baseline].label}"
            cells = _tested(effects)
            if grouped:
                title += ", means over points"
                content = ("", *map(describe, points[:-1]), "all"), tuple(zip(labels, *cells, strict=True)), 1
            else:
                content = _by_point(results, points, labels, cells, "mean over all")
            family = "cells but those of all" if grouped else "points"
            tables.append(Table(title, *content, _paired_caption(described, effects, family)))
    return tables


def _mean_effects(results: Results, rows: pd.DataFrame) -> Iterator[tuple[bool, list[Point], _Effects]]:
    """Of `differences`: by the kind's groups of points, where these are several, and by point.

    Each time: whether it is by groups, what the points of each group have in common, and the effects. Behind several
    groups there is one of all points.
    """
    points = sorted(set(rows.point))
    groupings = [results.groups(points, results.varying)] if points else []
    groups = results.groups(points, LAYOUTS[results.report.kind].grouped_by)
    if 1 < len(groups) < len(points):
        groupings.insert(0, groups)
    for groups in groupings:
        found = [*groups, ({}, points)] if len(groups) > 1 else groups
        effects = [
            [mean_effect(rows[(rows.system == name) & rows.point.isin(members)]) for name in results.labels(rows)]
            for _, members in found
        ]
        yield len(groups) < len(points), [point for point, _ in found], effects


def _by_point(
    results: Results, points: Sequence[Point], systems: Iterable[str], cells: _Cells, last: str = ""
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...], int]:
    """Columns, rows and texts of a `Table`: one row a point, or of several the ``last`` for what is so called."""
    names = [name for name in results.varying if any(name in point for point in points)]
    heads = [tuple(format_value(point.get(name)) for name in names) or ("all points",) for point in points]
    if last and len(heads) > 1:
        heads[-1] = (last, *[""] * (len(names) - 1))
    rows = tuple((*head, *row) for head, row in zip(heads, cells, strict=True))
    return (*(map(spaced, names) if names else [""]), *systems), rows, len(heads[0])


def _speed_up_caption(metric: Metric, effects: _Effects) -> str:
    rounds = _rounds(effects)
    sense = "baseline / system" if metric.better == "lower" else "system / baseline"
    text = f"{sense}: more than 1 is better. Means are over the points that a system shares with the baseline."
    if max(rounds) < 2:
        return f"{text} Fewer than two rounds: no confidence interval."
    text += f" Geometric mean of the ratios within each of {count_rounds(rounds)}"
    text += f"; in brackets its {CONFIDENCE:.0%} confidence interval (Student's t on the logarithms)."
    return f"{text} No brackets: fewer than two rounds, no interval." if min(rounds) < 2 else text


def _paired_caption(metric: Metric, effects: _Effects, family: str) -> str:
    better = {"higher": "More than 0 is better. ", "lower": "Less than 0 is better. ", None: ""}[metric.better]
    return (
        f"{better}Means of {count_rounds(_rounds(effects))}; in brackets the {CONFIDENCE:.0%} interval of the paired "
        f"difference (Student's t) and p of the paired t-test, adjusted over the table's {family} (Benjamini and "
        "Hochberg). Means over points are those over the points that a system shares with the baseline."
    )


def _rounds(effects: _Effects) -> list[int]:
    return [len(effect) for row in effects for effect in row if len(effect)]


def _tested(effects: _Effects) -> _Cells:
    """Cells of `paired_tables`. The last of several rows holds the same figures again: it is not in the family."""
    p_values = np.array([[*map(p_value, row)] for row in effects])
    family = p_values[:-1] if len(p_values) > 1 else p_values
    family[:] = adjust(family)
    return [[*map(format_difference, *row)] for row in zip(effects, p_values, strict=True)]


def median_tables(results: Results) -> list[Table]:
    """For each metric: every system at every point."""
    return [_median_table(results, metric) for metric in results.metrics]


def _median_table(results: Results, metric: str) -> Table:
    described, rows = results.report.metrics[metric], results.rows(metric)
    labels = results.labels(rows)
    values = rows.groupby(["point", "system"]).value
    spreads = values.agg(["median", "min", "max", "size"])
    cells = spreads.apply(format_spread, axis=1).unstack(fill_value="-")[[*labels]].rename(columns=labels)
    caption = {"higher": "Higher is better. ", "lower": "Lower is better. ", None: ""}[described.better]
    if (spreads["size"] > 1).any():
        ranges = (values.quantile(0.75) - values.quantile(0.25)) / spreads["median"].abs()
        cells["IQR"] = ranges.fillna(0).groupby("point").max().map("{:.1%}".format)
        caption += (
            f"Median (smallest to largest) of {count_rounds(spreads['size'])}. "
            "IQR: the largest interquartile range of the systems, relative to its median."
        )
    else:
        caption += "One value each: no spread."
    points = [results.points[number] for number in cells.index]
    content = _by_point(results, points, cells.columns, cells.to_numpy().tolist())
    return Table(label_with_unit(described), *content, caption)


def format_spread(spread: pd.Series) -> str:
    """Median (smallest to largest), or the one value."""
    median, low, high = (format_number(spread[name]) for name in ("median", "min", "max"))
    return median if spread["min"] == spread["max"] else f"{median} ({low} to {high})"


def format_ratio(effect: pd.Series) -> str:
    """A speed-up with its confidence interval, to two decimals (tiny ones to three digits)."""
    if effect.empty:
        return "-"
    ratio, low, high = (
        f"{value:.2f}" if value >= 0.1 else f"{value:.2g}" for value in np.exp([effect.mean(), *interval(effect)])
    )
    return ratio if len(effect) < 2 else f"{ratio} ({low} to {high})"


def format_difference(effect: pd.Series, adjusted: float) -> str:
    """A difference with its interval and p-value, where that is known."""
    if effect.empty:
        return "-"
    if np.isnan(adjusted):
        return f"{effect.mean():+.4f}"
    low, high = interval(effect)
    p = "p < 0.001" if adjusted < 0.001 else f"p = {adjusted:.3f}"
    return f"{effect.mean():+.4f} ({low:+.4f} to {high:+.4f}, {p})"
