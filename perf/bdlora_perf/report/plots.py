"""The plots of a report, drawn by seaborn from the long frame: lines, bars, percentiles, stacks and speed-ups."""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from textwrap import fill
from typing import Any, Protocol

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import rc_context
from matplotlib.ticker import FuncFormatter

from bdlora_perf.report.axes import format_tick, is_number, set_axes
from bdlora_perf.report.frame import (
    CONFIDENCE,
    Results,
    by_round,
    count_rounds,
    describe,
    interval,
    label_with_unit,
    spaced,
)

# More panels than these are no plot any more; the tables hold all.
_MOST_PANELS = 12
# What a metric's name begins with, by percentile: SGLang calls p50 the median.
_PERCENTILES = {"median": "p50", "p90": "p90", "p95": "p95", "p99": "p99"}
_SETTINGS = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "text.parse_math": False,  # a dollar sign in a label is a dollar sign
    "svg.fonttype": "path",  # looks the same with whatever fonts the reader has
}
_RANGE: dict[str, Any] = {"estimator": "median", "errorbar": ("pi", 100)}


@dataclass(frozen=True)
class Plot:
    """One drawn plot: ``svg`` is a whole file."""

    name: str
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Drawing:
    """seaborn's grid, and the words that go with it."""

    grid: sns.FacetGrid
    title: str
    caption: str


class Plotter(Protocol):
    """Draws what it finds of its metrics, or nothing."""

    @property
    def name(self) -> str: ...
    def draw(self, results: Results) -> Drawing | None: ...


def draw_plots(results: Results, plotters: Iterable[Plotter]) -> list[Plot]:
    """Those that the samples allow. The same report gives the same bytes."""
    plots = []
    for plotter in plotters:
        with sns.axes_style("whitegrid"), rc_context({**_SETTINGS, "svg.hashsalt": plotter.name}):
            drawing = plotter.draw(results)
            if drawing is not None:
                buffer = io.StringIO()
                nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
                drawing.grid.figure.savefig(buffer, format="svg", bbox_inches="tight", metadata=nothing)
                sns.mpl.pyplot.close(drawing.grid.figure)
                plots.append(Plot(plotter.name, drawing.title, " ".join(drawing.caption.split()), buffer.getvalue()))
    return plots


def _colors(results: Results) -> dict[str, Any]:
    """By label, the same in every plot; the colour-blind can tell the first ten apart."""
    names = [fill(system.label, 40) for system in results.report.systems.values()]
    return dict(zip(names, islice(cycle(sns.color_palette("colorblind")), len(names)), strict=True))


def _labelled(results: Results, rows: pd.DataFrame) -> pd.DataFrame:
    """With the column ``label``, in the report's order."""
    labels = {name: fill(results.report.systems[name].label, 40) for name in results.systems}
    found = [labels[name] for name in results.systems if (rows.system == name).any()]
    return rows.assign(label=pd.Categorical(rows.system.map(labels), [*dict.fromkeys(found)], ordered=True))


def panelled(panels: Sequence[tuple[str, pd.DataFrame]], most: int = _MOST_PANELS) -> tuple[pd.DataFrame, str]:
    """One frame with the column ``panel``; where there are too many, some evenly spread, and a sentence about it."""
    picked = panels
    if len(panels) > most:
        picked = [panels[round(i * (len(panels) - 1) / (most - 1))] for i in range(most)]
    titles = [fill(title, 60) for title, _ in picked]
    frame = pd.concat([rows.assign(panel=title) for title, (_, rows) in zip(titles, picked, strict=True)])
    frame["panel"] = pd.Categorical(frame.panel, [*dict.fromkeys(titles)], ordered=True)
    left_out = f"{most} of {len(panels)} panels; the tables hold all." if len(panels) > most else ""
    return frame, left_out


def finish(grid: sns.FacetGrid, x: str, y: str) -> None:
    grid.set_titles("{col_name}")
    grid.set_axis_labels(x, y)
    for axes in grid.axes.flat:
        axes.spines[["top", "right"]].set_visible(False)
        for axis in (axes.xaxis, axes.yaxis):
            if isinstance(axis.get_major_formatter(), FuncFormatter) or axis.get_scale() == "log":
                axis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))
                axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    if grid.legend is not None:
        sns.move_legend(grid, "lower left", bbox_to_anchor=(0, 1), ncols=3, title=None, frameon=False)


def _bars(rows: pd.DataFrame, results: Results, x: str, wrap: int = 2, **options: Any) -> sns.FacetGrid:
    return sns.catplot(
        rows, kind="bar", x=x, y="value", hue="label", palette=_colors(results), col="panel",
        col_wrap=min(wrap, rows.panel.nunique()), height=2.6, aspect=1.9 if wrap > 1 else 4,
        err_kws={"linewidth": 0.9}, capsize=0.2, **options,
    )  # fmt: skip


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
        known = [name for name in self.x if name in rows and any(map(is_number, rows[name]))]
        if not known:
            return None
        x = known[0]
        rows = _labelled(results, rows[rows[x].map(is_number)])
        others = [name for name in results.dimensions(rows) if name != x]
        panels = []
        for _, points in results.groups(rows.point, others if self.panels is None else self.panels):
            # The longest line of a panel; of equals the last, which has the largest numbers.
            held, line = max(reversed(results.groups(points, others)), key=lambda found: len(found[1]))
            panels.append((describe(held, others) if others else "", rows[rows.point.isin(line)]))
        shown, left_out = panelled(panels)
        shown = shown.astype({x: float})
        metric = results.report.metrics[self.metric]
        caption = f"Medians of {_rounds(shown)}; error bars from the smallest to the largest. {left_out}"
        if shown[x].nunique() == 1:
            grid = _bars(shown.assign(**{x: f"{spaced(x)} {shown[x].iloc[0]:g}"}), results, x, **_RANGE)
            finish(grid, "", label_with_unit(metric))
            return Drawing(grid, metric.label, caption)
        grid = sns.relplot(
            shown, kind="line", x=x, y="value", hue="label", style="label", palette=_colors(results), col="panel",
            col_wrap=min(2, shown.panel.nunique()), height=2.7, aspect=1.9, markers=True, dashes=False,
            err_style="bars", facet_kws={"sharex": False}, **_RANGE,
        )  # fmt: skip
        finish(grid, spaced(x), label_with_unit(metric))
        for axes, (_, drawn) in zip(grid.axes.flat, shown.groupby("panel", observed=True), strict=True):
            set_axes(axes, sorted(set(drawn[x])), x == "bytes", self.log_y)
        return Drawing(grid, f"{metric.label} against {spaced(x)}", caption)


def _rounds(rows: pd.DataFrame) -> str:
    return count_rounds(rows.groupby(["point", "system"])["round"].nunique())


@dataclass(frozen=True)
class Percentiles:
    """Latency percentiles by system, a panel a point and latency; ``latencies`` by how a metric's name ends."""

    name: str
    latencies: Mapping[str, str]

    def draw(self, results: Results) -> Drawing | None:
        names = {f"{p}_{latency}": label for latency in self.latencies for p, label in _PERCENTILES.items()}
        rows = results.frame[results.frame.metric.isin([name for name in names if name in results.metrics])]
        if rows.empty:
            return None
        rows = _labelled(results, rows.assign(percentile=rows.metric.map(names)))
        panels = []
        for number, of_point in rows.groupby("point"):
            where = describe(results.points[int(str(number))], results.varying)
            for ending, title in self.latencies.items():
                own = of_point[of_point.metric.str.endswith(f"_{ending}")]
                if len(own):
                    panels.append((f"{title}, {where}" if results.varying else title, own))
        shown, left_out = panelled(panels)
        order = [label for label in _PERCENTILES.values() if (shown.percentile == label).any()]
        grid = _bars(shown, results, "percentile", wrap=4, sharey=False, order=order, **_RANGE)
        finish(grid, "", "ms")
        caption = f"Medians of {_rounds(shown)}; error bars from the smallest to the largest. {left_out}"
        return Drawing(grid, "Latency percentiles", caption)


@dataclass(frozen=True)
class SpeedUps:
    """Every system over every baseline; one panel a baseline, metric and combination of the dimensions ``panels``."""

    name: str
    headlines: tuple[str, ...]
    grouped_by: tuple[str, ...]
    panels: tuple[str, ...] = ()

    def draw(self, results: Results) -> Drawing | None:
        panels = []
        for baseline in results.report.baselines:
            for metric in [name for name in results.metrics if name in self.headlines]:
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
        bars: dict[str, Any] = {
            "estimator": lambda v: float(np.exp(np.mean(v))),
            "errorbar": _interval_of if several else None,
        }
        grid = _bars(_labelled(results, shown), results, "group", wrap=1 if wide else 2, **bars)
        grid.refline(y=1, color="black", linewidth=1)
        finish(grid, "", "speed-up")
        caption = "More than 1 (dashed: the baseline) is better. Geometric means over points and rounds; "
        caption += f"error bars: {CONFIDENCE:.0%} confidence intervals." if several else "no confidence intervals."
        return Drawing(grid, "Speed-up", f"{caption} {left_out}")

    def _by_group(self, results: Results, logs: pd.DataFrame) -> pd.DataFrame:
        """Per system, group of points and round the mean log-ratio, in ``value``."""
        found = []
        for group, points in results.groups(logs.point, self.grouped_by):
            for name, own in logs[logs.point.isin(points)].groupby("system"):
                # Where no round has all points, the mean over the points stands for it.
                means = by_round(own) if len(by_round(own)) else own.groupby("point").log.mean()
                found.append(pd.DataFrame({"system": name, "group": fill(describe(group), 16), "value": [*means]}))
        return pd.concat(found)


def _interval_of(logs: pd.Series) -> tuple[float, float]:
    return interval([*logs]) if len(logs) > 1 else (np.nan, np.nan)


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
        metrics = [name for name in results.metrics if name.startswith(self.prefix)]
        if not metrics:
            return None
        rows = _labelled(results, results.frame[results.frame.metric.isin(metrics)])
        labels = {name: results.report.metrics[name].label for name in metrics}
        rows = rows.assign(part=rows[self.part] if self.part else rows.metric.map(labels))
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
        finish(grid, label_with_unit(results.report.metrics[metrics[0]]) if self.part else self._axis(results), "")
        return Drawing(grid, self.title, f"Medians over the rounds. {left_out}")

    def _axis(self, results: Results) -> str:
        unit = next(m.unit for name, m in results.report.metrics.items() if name.startswith(self.prefix))
        return f"{self.title} [{unit}]"
