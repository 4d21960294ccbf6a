"""Plots of a metric against a number of the sweep."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from bdlora_perf.report.plot_style import (
    Bar,
    Drawing,
    SystemStyle,
    add_legend,
    format_axis,
    format_bytes,
    format_tick,
    grouped_bars,
    make_panels,
    pick,
    set_title,
)
from bdlora_perf.report.results import Point, Results, count_rounds, describe, label_with_unit, spaced
from bdlora_perf.report.statistics import Spread

# More panels than this are no plot any more.
_MOST_PANELS = 12
# Labels that are at least this part of the axis apart do not touch.
_LEAST_GAP = 1 / 7
_AXIS_LABELS = {
    "bytes": "message size",
    "concurrency": "concurrency [requests in flight]",
    "request_rate": "request rate [1/s]",
    "requests": "requests in the batch",
}


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

    def draw(self, results: Results, styles: Mapping[str, SystemStyle]) -> Drawing | None:
        measured = results.measured(self.metric, results.systems)
        by_x = {name: [point for point in measured if point.number(name) is not None] for name in self.x}
        x = next((name for name, points in by_x.items() if points), None)
        if x is None:
            return None
        others = tuple(name for name in results.dimensions(by_x[x]) if name != x)
        groups = results.groups(by_x[x], others if self.panels is None else self.panels)
        # The longest line of a panel; of equals the last, which has the largest numbers.
        lines = [
            max(reversed(results.groups(group, others).items()), key=lambda line: len(line[1]))
            for group in groups.values()
        ]
        shown, left_out = pick(lines, _MOST_PANELS)
        single = all(len(line) == 1 for _, line in shown)
        figure, axes = make_panels(len(shown), 2, 2.7, share_y=True)
        metric = results.report.metrics[self.metric]
        drawn: dict[str, list[Spread]] = {}
        for panel, (held, line) in zip(axes, shown, strict=True):
            found = {name: [results.spread(name, point, self.metric) for point in line] for name in results.systems}
            known = {name: spreads for name, spreads in found.items() if any(spreads)}
            for name, spreads in known.items():
                drawn.setdefault(name, []).extend(spread for spread in spreads if spread is not None)
            if single:
                grouped_bars(panel, [describe(line[0], [x])], known, styles)
            else:
                _draw_lines(panel, x, line, known, styles)
            if others and len(shown) > 1:
                set_title(panel, describe(held, others))
        highest = max(spread.high for spread in chain.from_iterable(drawn.values())) or 1
        for index, panel in enumerate(axes):
            # The axes are shared: limits that are set before all is drawn would cut off what comes.
            if self.log_y:
                panel.set_yscale("log")
            else:
                panel.set_ylim(0, 1.05 * highest)
            format_axis(panel.yaxis)
            panel.set_ylabel(label_with_unit(metric) if index % 2 == 0 else "")
        legend = [styles[name].patch() if single else styles[name].curve() for name in results.systems if name in drawn]
        add_legend(figure, legend)
        rounds = count_rounds(chain.from_iterable(drawn.values()))
        where = f"At {describe(shown[0][0], others)}." if others and len(shown) == 1 else ""
        caption = f"Medians of {rounds}; error bars from the smallest to the largest. {where} {left_out}"
        title = metric.label if single else f"{metric.label} against {spaced(x)}"
        return Drawing(figure, title, " ".join(caption.split()))


def _draw_lines(
    panel: Axes,
    x: str,
    line: Sequence[Point],
    measured: Mapping[str, Sequence[Spread | None]],
    styles: Mapping[str, SystemStyle],
) -> None:
    numbers = [number for point in line if (number := point.number(x)) is not None]
    for name, spreads in measured.items():
        known = [(number, Bar.of(spread)) for number, spread in zip(numbers, spreads, strict=True) if spread]
        panel.errorbar(
            [number for number, _ in known],
            [bar.height for _, bar in known],
            yerr=[[bar.height - bar.low for _, bar in known], [bar.high - bar.height for _, bar in known]],
            color=styles[name].color,
            marker=styles[name].marker,
            linestyle=styles[name].line,
            markersize=4,
            linewidth=1.4,
        )
    logarithmic = numbers[0] > 0 and numbers[-1] >= 8 * numbers[0]
    if logarithmic:
        panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator(choose_ticks(numbers, logarithmic)))
    panel.xaxis.set_minor_locator(NullLocator())
    format_axis(panel.xaxis, format_bytes if x == "bytes" else format_tick)
    panel.set_xlabel(_AXIS_LABELS.get(x, spaced(x)))


def choose_ticks(numbers: Sequence[float], logarithmic: bool) -> list[float]:
    """Of ascending ``numbers`` the first, and each whose label does not touch the label before it."""
    places = [math.log2(number) if logarithmic else number for number in numbers]
    gap = _LEAST_GAP * (places[-1] - places[0])
    chosen = [0]
    for i, place in enumerate(places):
        if i and place - places[chosen[-1]] >= gap:
            chosen.append(i)
    return [numbers[i] for i in chosen]
