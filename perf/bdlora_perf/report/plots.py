"""The plots of a report, drawn by seaborn from the long frame: lines, bars, stacks, speed-ups and trade-offs."""

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import rc_context

from bdlora_perf.report.drawing import Drawing, Plot, bars, colors, labelled, line_grid, panelled, set_y
from bdlora_perf.report.frame import CONFIDENCE, Results, interval, mean_effect
from bdlora_perf.report.words import count_rounds, describe, label_with_unit, spaced

# What a metric's name begins with, by percentile: SGLang calls p50 the median.
_PERCENTILES = {"median": "p50", "p90": "p90", "p95": "p95", "p99": "p99"}
_SETTINGS = {
    "font.size": 9,
    "axes.titlesize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "text.parse_math": False,  # a dollar sign in a label is a dollar sign
    "svg.fonttype": "path",  # looks the same with whatever fonts the reader has
}
_RANGE: dict[str, Any] = {"estimator": "median", "errorbar": ("pi", 100)}


def _medians(rows: pd.DataFrame, left_out: str) -> str:
    """The caption of a plot with the options `_RANGE`."""
    rounds = count_rounds(rows.groupby(["point", "system"])["round"].nunique())
    return f"Medians of {rounds}; error bars from the smallest to the largest. {left_out}"


@dataclass(frozen=True)
class Lines:
    """A metric against a dimension of the sweep, one line a system; bars where that dimension has one value.

    ``x`` are dimensions; the first that holds numbers is taken. There is one panel for each combination of the
    dimensions ``panels``, or of all others; those that are left are held where a panel then has most points.
    """

    name: str
    metric: str
    x: tuple[str, ...]
    panels: tuple[str, ...] | None = None
    log_y: bool = False

    def draw(self, results: Results) -> Drawing | None:
        rows = results.rows(self.metric)
        x = next((name for name in self.x if name in rows and rows[name].map(pd.api.types.is_number).any()), None)
        if x is None:
            return None
        rows = labelled(results, rows[rows[x].map(pd.api.types.is_number)]).astype({x: float})
        others = [name for name in results.dimensions(rows) if name != x]
        panels = []
        for _, points in results.groups(rows.point, others if self.panels is None else self.panels):
            # The longest line of a panel; of equals the last, which has the largest numbers.
            held, line = max(reversed(results.groups(points, others)), key=lambda found: len(found[1]))
            panels.append((describe(held, others) if others else "", rows[rows.point.isin(line)]))
        shown, left_out = panelled(panels)
        metric = results.report.metrics[self.metric]
        title = f"{metric.label} against {spaced(x)}"
        if shown[x].nunique() == 1:
            grid = bars(shown.assign(**{x: f"{spaced(x)} {shown[x].iloc[0]:g}"}), results, x, **_RANGE)
            x, title = "", metric.label
        else:
            grid = line_grid(
                shown, x, 2, palette=colors(results), height=2.7, aspect=1.9, facet_kws={"sharex": False}, **_RANGE
            )
            for axes in grid.axes.flat:
                set_y(axes, self.log_y)
        return grid, spaced(x), label_with_unit(metric), title, _medians(shown, left_out)


@dataclass(frozen=True)
class Percentiles:
    """Latency percentiles by system, a panel a point and latency; ``latencies`` by how a metric's name ends."""

    name: str
    latencies: Mapping[str, str]

    def draw(self, results: Results) -> Drawing | None:
        names = {f"{p}_{latency}": label for latency in self.latencies for p, label in _PERCENTILES.items()}
        rows = results.frame[results.frame.metric.isin(names)]
        if rows.empty:
            return None
        rows = labelled(results, rows.assign(percentile=rows.metric.map(names)))
        panels = [
            (f"{title}, {describe(results.points[number], results.varying)}" if results.varying else title, own)
            for number, of_point in rows.groupby("point")
            for ending, title in self.latencies.items()
            if len(own := of_point[of_point.metric.str.endswith(f"_{ending}")])
        ]
        shown, left_out = panelled(panels)
        order = [label for label in _PERCENTILES.values() if (shown.percentile == label).any()]
        grid = bars(shown, results, "percentile", wrap=4, sharey=False, order=order, **_RANGE)
        return grid, "", "ms", "Latency percentiles", _medians(shown, left_out)


@dataclass(frozen=True)
class SpeedUps:
    """Every system over every baseline; one panel a baseline, metric and combination of the dimensions ``panels``."""

    name: str
    headlines: tuple[str, ...]
    grouped_by: tuple[str, ...]
    panels: tuple[str, ...] = ()

    def draw(self, results: Results) -> Drawing | None:
        panels = []
        headlines = [name for name in results.metrics if name in self.headlines]
        for baseline, metric in product(results.report.baselines, headlines):
            logs = results.logs(metric, baseline)
            title = f"{results.report.metrics[metric].label}, over {results.report.systems[baseline].label}"
            for group, points in results.groups(logs.point, self.panels):
                where = f"; {describe(group)}" if group else ""
                panels.append((title + where, self._by_group(results, logs[logs.point.isin(points)])))
        if not panels:
            return None
        shown, left_out = panelled(panels)
        wide = shown.group.nunique() * shown.system.nunique() > 24
        several = shown.groupby(["panel", "group", "system"], observed=True).size().max() > 1
        grid = bars(
            labelled(results, shown), results, "group", wrap=1 if wide else 2,
            estimator=lambda logs: np.exp(logs.mean()), errorbar=lambda logs: np.exp(interval(logs)),
        )  # fmt: skip
        grid.refline(y=1, color="black", linewidth=1)
        caption = "More than 1 (dashed: the baseline) is better. Geometric means over points and rounds; "
        caption += f"error bars: {CONFIDENCE:.0%} confidence intervals." if several else "no confidence intervals."
        return grid, "", "speed-up", "Speed-up", f"{caption} {left_out}"

    def _by_group(self, results: Results, logs: pd.DataFrame) -> pd.DataFrame:
        """Per system, group of points and round the `mean_effect`, in ``value``."""
        return pd.concat(
            pd.DataFrame({"system": name, "group": fill(describe(group), 16), "value": mean_effect(own)})
            for group, points in results.groups(logs.point, self.grouped_by)
            for name, own in logs[logs.point.isin(points)].groupby("system")
        )


@dataclass(frozen=True)
class Stack:
    """The metrics that begin with ``prefix`` as parts of one bar a system; one panel a point.

    Points that differ in the dimensions ``pooled`` alone are one panel: there the parts do not depend on them. Where
    ``part`` is a dimension, its values are the parts.
    """

    name: str
    title: str
    prefix: str
    pooled: tuple[str, ...] = ()
    part: str | None = None

    def draw(self, results: Results) -> Drawing | None:
        metrics = {name: results.report.metrics[name] for name in results.metrics if name.startswith(self.prefix)}
        if not metrics:
            return None
        rows = labelled(results, results.frame[results.frame.metric.isin(metrics)])
        rows = rows.assign(part=rows[self.part] if self.part else rows.metric.map(lambda name: metrics[name].label))
        kept = [name for name in results.dimensions(rows) if name not in (*self.pooled, self.part)]
        panels = []
        for group, points in results.groups(rows.point, kept):
            medians = rows[rows.point.isin(points)].groupby(["label", "part"], observed=True, sort=False).value.median()
            panels.append((describe(group) if group else "", medians.reset_index()))
        shown, left_out = panelled(panels, 6)
        grid = sns.displot(
            shown, kind="hist", y="label", hue="part", weights="value", multiple="stack", shrink=0.7, col="panel",
            col_wrap=min(2, shown.panel.nunique()), palette=sns.color_palette("pastel", shown.part.nunique()),
            height=0.9 + 0.34 * shown.label.nunique(), aspect=2.2, facet_kws={"sharex": False},
        )  # fmt: skip
        first = next(iter(metrics.values()))
        x = label_with_unit(first) if self.part else f"{self.title} [{first.unit}]"
        return grid, x, "", self.title, f"Medians over the rounds. {left_out}"


@dataclass(frozen=True)
class TradeOff:
    """One metric against another, a line for each family of systems; one panel a task.

    Means over the rounds with Student's t interval. Systems say by their details ``kind`` whether they take part, and
    by ``family`` which line they are on. Nothing is drawn of the first of ``kinds``, the baseline, alone.
    """

    name: str
    title: str
    y: str
    kinds: tuple[str, ...]
    x: str = "parameters"

    def draw(self, results: Results) -> Drawing | None:
        details = {name: results.report.systems[name].details for name in results.systems}
        families = {name: str(found["family"]) for name, found in details.items() if found.get("kind") in self.kinds}
        matched = ["system", "point", "round"]
        pairs = results.rows(self.y).merge(results.rows(self.x)[[*matched, "value"]], on=matched, suffixes=("", "_x"))
        pairs = pairs[pairs.system.isin(families)]
        if pairs.empty or not {details[name]["kind"] for name in families} >= set(self.kinds[1:]):
            return None
        labels = pd.Categorical(pairs.system.map(families), [*dict.fromkeys(families.values())], ordered=True)
        pairs = pairs.assign(label=labels)
        panels = [
            # Two systems of one family may stand for one adapter, beside different baselines.
            (describe(group), pairs[pairs.point.isin(points)].drop_duplicates(["label", "value_x", "round"]))
            for group, points in results.groups(pairs.point, ["task"])
        ]
        shown, left_out = panelled(panels)
        grid = line_grid(
            shown, "value_x", 3, palette="colorblind", height=3.0, aspect=max(1.1, 3.2 / shown.panel.nunique()),
            estimator="mean", errorbar=interval, facet_kws={"sharex": False, "sharey": False},
        )  # fmt: skip
        x, y = (label_with_unit(results.report.metrics[name]) for name in (self.x, self.y))
        rounds = count_rounds(shown.groupby(["panel", "label", "value_x"], observed=True)["round"].nunique())
        caption = f"Means of {rounds}; error bars: Student's t intervals, {CONFIDENCE:.0%}. {left_out}"
        return grid, x, y, self.title, caption


# What draws one plot of what it finds of its metrics, or nothing.
Plotter = Lines | Percentiles | SpeedUps | Stack | TradeOff


def draw_plots(results: Results, plotters: Iterable[Plotter]) -> list[Plot]:
    """Those that the samples allow. The same report gives the same bytes."""
    plots = []
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    for plotter in plotters:
        with sns.axes_style("whitegrid"), rc_context({**_SETTINGS, "svg.hashsalt": plotter.name}):
            if drawing := plotter.draw(results):
                grid, x, y, title, caption = drawing
                grid.set_titles("{col_name}").set_axis_labels(x, y)
                if grid.legend is not None:
                    sns.move_legend(grid, "lower left", bbox_to_anchor=(0, 1), ncols=3, title=None, frameon=False)
                buffer = io.StringIO()
                grid.savefig(buffer, format="svg", metadata=nothing)
                sns.mpl.pyplot.close(grid.figure)
                plots.append(Plot(plotter.name, title, " ".join(caption.split()), buffer.getvalue()))
    return plots
