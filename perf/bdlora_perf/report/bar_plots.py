"""Plots that compare the systems bar by bar."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median

from bdlora_perf.report.plot_style import (
    Drawing,
    SystemStyle,
    add_legend,
    grouped_bars,
    make_panels,
    part_patches,
    pick,
    set_title,
    stacked_bars,
)
from bdlora_perf.report.results import Point, Results, count_rounds, describe, label_with_unit
from bdlora_perf.report.statistics import CONFIDENCE, Ratio, Spread
from bdlora_perf.report.tables import GROUPED_BY, compared_systems

_MOST_POINTS = 6
_MOST_ROWS = 4
# What a metric's name begins with, by percentile: SGLang calls p50 the median.
_PERCENTILES = {"p50": "median", "p90": "p90", "p95": "p95", "p99": "p99"}
# More bars than this in a panel need the whole width.
_MOST_BARS = 24


@dataclass(frozen=True)
class Percentiles:
    """Latency percentiles by system, a row of panels a point; ``latencies`` are titles by how a metric's name ends."""

    name: str
    latencies: Mapping[str, str]

    def draw(self, results: Results, styles: Mapping[str, SystemStyle]) -> Drawing | None:
        found = {
            ending: [label for label, prefix in _PERCENTILES.items() if f"{prefix}_{ending}" in results.metrics]
            for ending in self.latencies
        }
        endings = [ending for ending in self.latencies if found[ending]]
        if not endings:
            return None
        first = f"{_PERCENTILES[found[endings[0]][0]]}_{endings[0]}"
        points, left_out = pick(results.measured(first, results.systems), _MOST_ROWS)
        systems = [name for name in results.systems if results.measured(first, [name])]
        figure, axes = make_panels(len(points) * len(endings), len(endings), 2.4)
        spreads: list[Spread] = []
        for panel, (point, ending) in zip(axes, product(points, endings), strict=True):
            metrics = [f"{_PERCENTILES[label]}_{ending}" for label in found[ending]]
            values = {name: [results.spread(name, point, metric) for metric in metrics] for name in systems}
            spreads += [spread for row in values.values() for spread in row if spread is not None]
            grouped_bars(panel, found[ending], values, styles)
            where = f", {describe(point, results.varying)}" if len(points) > 1 else ""
            set_title(panel, self.latencies[ending] + where)
            panel.set_ylabel(results.report.metrics[metrics[0]].unit)
        add_legend(figure, [styles[name].patch() for name in systems])
        caption = f"Medians of {count_rounds(spreads)}; error bars from the smallest to the largest. {left_out}"
        return Drawing(figure, "Latency percentiles", caption.strip())


@dataclass(frozen=True)
class SpeedUps:
    """Every system over every baseline; one panel a baseline, metric and combination of the dimensions ``panels``."""

    name: str
    panels: tuple[str, ...] = ()

    def draw(self, results: Results, styles: Mapping[str, SystemStyle]) -> Drawing | None:
        content = [
            (baseline, metric, group, points, systems)
            for baseline in results.report.baselines
            for metric in results.headlines
            if (systems := compared_systems(results, baseline, metric))
            for group, points in results.groups(results.measured(metric, [baseline]), self.panels).items()
        ]
        if not content:
            return None
        shown, left_out = pick(content, 2 * _MOST_POINTS)
        grouped = [results.groups(points, GROUPED_BY[results.report.kind]) for _, _, _, points, _ in shown]
        wide = any(len(groups) * len(item[-1]) > _MOST_BARS for groups, item in zip(grouped, shown, strict=True))
        figure, axes = make_panels(len(shown), 1 if wide else 2, 2.6, wide=wide)
        drawn: set[str] = set()
        ratios: list[Ratio] = []
        for panel, groups, (baseline, metric, group, _, systems) in zip(axes, grouped, shown, strict=True):
            values = {
                name: [results.speed_up(name, baseline, metric, points) for points in groups.values()]
                for name in systems
            }
            drawn.update(systems)
            ratios += [ratio for row in values.values() for ratio in row if ratio is not None]
            labels = [describe(key, GROUPED_BY[results.report.kind]) for key in groups]
            grouped_bars(panel, labels, values, styles)
            panel.axhline(1, color=styles[baseline].color, linewidth=1.2, linestyle="--")
            title = f"{results.report.metrics[metric].label}, over {styles[baseline].label}"
            set_title(panel, f"{title}; {describe(group, results.varying)}" if group.items else title)
            panel.set_ylabel("speed-up")
        add_legend(figure, [styles[name].patch() for name in results.systems if name in drawn])
        intervals = any(ratio.interval for ratio in ratios)
        caption = (
            f"More than 1 (dashed: the baseline) is better. Geometric means over points and {count_rounds(ratios)}; "
            + (f"error bars: {CONFIDENCE:.0%} confidence intervals." if intervals else "no confidence intervals.")
        )
        return Drawing(figure, "Speed-up", f"{caption} {left_out}".strip())


@dataclass(frozen=True)
class Parts:
    """The metrics that begin with ``prefix`` as parts of one bar a system; one panel a point.

    Points that differ in the dimensions ``pooled`` alone are one panel: there the parts do not depend on them.
    """

    name: str
    title: str
    prefix: str
    pooled: tuple[str, ...] = ()

    def draw(self, results: Results, styles: Mapping[str, SystemStyle]) -> Drawing | None:
        metrics = results.parts(self.prefix)
        if not metrics:
            return None
        measured = {point for metric in metrics for point in results.measured(metric, results.systems)}
        kept = [name for name in results.varying if name not in self.pooled]
        panels = [
            (
                describe(group, results.varying),
                {name: [_pool(results, name, points, metric) for metric in metrics] for name in styles},
            )
            for group, points in results.groups(results.in_order(measured), kept).items()
        ]
        described = [results.report.metrics[metric] for metric in metrics]
        unit = described[0].unit
        return _draw_stacks(
            self.title,
            [(*panel, f"{self.title} [{unit}]") for panel in panels],
            [metric.label for metric in described],
            styles,
        )


def _pool(results: Results, system: str, points: Sequence[Point], metric: str) -> float | None:
    values = [value for point in points for value in results.rounds(system, point, metric).values()]
    return median(values) if values else None


@dataclass(frozen=True)
class Operations:
    """Metrics that are counted for each ``point["operation"]``, as parts of one bar a system."""

    name: str
    title: str
    metrics: tuple[str, ...]

    def draw(self, results: Results, styles: Mapping[str, SystemStyle]) -> Drawing | None:
        measured = {metric: results.measured(metric, results.systems) for metric in self.metrics}
        operations = list(dict.fromkeys(str(p.get("operation")) for points in measured.values() for p in points))
        kept = [name for name in results.varying if name != "operation"]
        panels = [
            (
                describe(group, results.varying),
                {
                    name: [
                        _pool(results, name, [p for p in points if p.get("operation") == operation], metric)
                        for operation in operations
                    ]
                    for name in styles
                },
                label_with_unit(results.report.metrics[metric]),
            )
            for metric, measured_points in measured.items()
            for group, points in results.groups(measured_points, kept).items()
        ]
        return _draw_stacks(self.title, panels, operations, styles) if panels else None


def _draw_stacks(
    title: str,
    panels: Sequence[tuple[str, Mapping[str, Sequence[float | None]], str]],
    labels: Sequence[str],
    styles: Mapping[str, SystemStyle],
) -> Drawing:
    """``panels``: title, lengths of the parts by system (None: not measured), label of the axis."""
    shown, left_out = pick(panels, _MOST_POINTS)
    measured = [{name: row for name, row in rows.items() if any(v is not None for v in row)} for _, rows, _ in shown]
    figure, axes = make_panels(len(shown), 2, 0.9 + 0.34 * max(map(len, measured)))
    for panel, (where, _, label), rows in zip(axes, shown, measured, strict=True):
        lengths = [[row[part] or 0.0 for row in rows.values()] for part in range(len(labels))]
        stacked_bars(panel, [styles[name].label for name in rows], lengths)
        set_title(panel, where if len(shown) > 1 else "")
        panel.set_xlabel(label)
    add_legend(figure, part_patches(labels))
    return Drawing(figure, title, f"Medians over the rounds, and their sum. {left_out}".strip())
