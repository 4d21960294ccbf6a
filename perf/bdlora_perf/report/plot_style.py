"""What all plots share: colours, panels, the legend, and how a figure becomes SVG."""

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from textwrap import fill
from typing import NamedTuple, TypeVar

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from bdlora_perf.report.schema import Report
from bdlora_perf.report.statistics import Ratio, Spread

_Panel = TypeVar("_Panel")
# Okabe and Ito's palette, which the colour-blind can tell apart, without black (lost on a dark page) and yellow (on a
# white one).
_SYSTEM_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#888888")
_MARKERS, _LINES, _HATCHES = ("o", "s", "^", "D"), ("-", "--", ":", "-."), ("", "///", "...", "xxx")
# Paul Tol's light palette: parts of a bar must not look like systems.
_PART_COLORS = ("#77aadd", "#ee8866", "#eedd88", "#ffaabb", "#99ddff", "#44bb99", "#bbcc33", "#aaaa00", "#bbbbbb")
# Stands for the text colour of the page until `to_svg` replaces it; no palette has it.
_INK = "#010203"
_WIDTH = 10.5  # inches of the widest figure; 1008 pixels on a page
_SETTINGS = {
    "axes.edgecolor": _INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "axes.axisbelow": True,
    "errorbar.capsize": 2,
    "font.size": 9,
    "grid.alpha": 0.2,
    "grid.color": _INK,
    "hatch.color": _INK,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.color": _INK,
    "text.parse_math": False,  # a dollar sign in a label is a dollar sign
    "svg.fonttype": "path",  # looks the same with whatever fonts the reader has
    "xtick.color": _INK,
    "ytick.color": _INK,
}


@contextmanager
def plot_settings(name: str) -> Iterator[None]:
    """Settings to draw and save the plot ``name`` under; the same plot gets the same bytes."""
    with rc_context({**_SETTINGS, "svg.hashsalt": name}):
        yield


@dataclass(frozen=True)
class SystemStyle:
    """How one system looks in every plot of a report."""

    label: str
    color: str
    marker: str
    line: str
    hatch: str

    def patch(self) -> Patch:
        """For the legend of bars."""
        return Patch(facecolor=self.color, hatch=self.hatch, label=self.label)

    def curve(self) -> Line2D:
        """For the legend of lines."""
        return Line2D([], [], color=self.color, marker=self.marker, linestyle=self.line, markersize=4, label=self.label)


def system_styles(report: Report) -> dict[str, SystemStyle]:
    """Styles by position in the report; where the colours start again, marker, line and hatch differ."""
    styles = {}
    for index, (name, system) in enumerate(report.systems.items()):
        again, color = divmod(index, len(_SYSTEM_COLORS))
        kind = again % len(_MARKERS)
        styles[name] = SystemStyle(system.label, _SYSTEM_COLORS[color], _MARKERS[kind], _LINES[kind], _HATCHES[kind])
    return styles


class Bar(NamedTuple):
    """The height of a bar, and where its error bar begins and ends."""

    height: float
    low: float
    high: float

    @classmethod
    def of(cls, measured: Spread | Ratio) -> "Bar":
        """Median, smallest and largest; or a speed-up and its confidence interval."""
        if isinstance(measured, Spread):
            return cls(measured.median, measured.low, measured.high)
        return cls(measured.value, *(measured.interval or (measured.value, measured.value)))


@dataclass(frozen=True)
class Drawing:
    """A figure, and the words that go with it."""

    figure: Figure
    title: str
    caption: str


def pick(panels: Sequence[_Panel], most: int) -> tuple[list[_Panel], str]:
    """At most ``most`` of them, evenly spread from the first to the last, and a sentence where some are left out."""
    if len(panels) <= most:
        return list(panels), ""
    shown = [panels[round(i * (len(panels) - 1) / (most - 1))] for i in range(most)]
    return shown, f"{most} of {len(panels)} panels; the tables hold all."


def make_panels(
    count: int, columns: int, height: float, *, wide: bool = False, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` axes, at most ``columns`` beside each other, each ``height`` inches high."""
    columns = min(count, columns)
    rows = -(-count // columns)
    width = _WIDTH if wide or columns > 1 else 0.62 * _WIDTH
    figure = Figure(figsize=(width, height * rows + 0.5), layout=ConstrainedLayoutEngine(hspace=0.06))
    axes = list(figure.subplots(rows, columns, sharey=share_y, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def set_title(axes: Axes, title: str) -> None:
    """A title in as many lines as the panel's width asks for."""
    inches = axes.get_position().width * axes.figure.bbox.width / axes.figure.dpi
    axes.set_title(fill(title, int(inches * 15)), loc="left")


def add_legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """One legend above all panels, in as many columns as fit."""
    labels = [fill(str(handle.get_label()), 40) for handle in handles]
    longest = max(len(line) for label in labels for line in label.splitlines())
    columns = max(1, int(figure.get_figwidth() * 12 / (longest + 7)))
    figure.legend(handles, labels, loc="outside upper left", ncols=min(columns, len(labels)))


def format_tick(value: float) -> str:
    """Short, for the axes: 1,500 and 2.5M."""
    for factor, letter in ((1e9, "G"), (1e6, "M")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def format_bytes(value: float) -> str:
    """In the largest binary unit that is not larger: 4 KiB."""
    power = max(0, int(math.log2(value)) // 10) if value >= 1 else 0
    return f"{value / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[min(power, 4)]}"


def format_axis(axis: Axis, form: Callable[[float], str] = format_tick) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    # A logarithmic axis of less than a decade has nothing but minor ticks: 2 and 5 are enough of them.
    axis.set_minor_formatter(FuncFormatter(lambda value, _: form(value) if f"{value:e}"[0] in "25" else ""))


def grouped_bars(
    axes: Axes,
    groups: Sequence[str],
    measured: Mapping[str, Sequence[Spread | Ratio | None]],
    styles: Mapping[str, SystemStyle],
) -> None:
    """For every group one bar a system; ``measured`` holds a figure a group, None where there is none."""
    width = 0.84 / len(measured)
    for index, (system, figures) in enumerate(measured.items()):
        known = [(group, Bar.of(figure)) for group, figure in enumerate(figures) if figure is not None]
        offset = (index - (len(measured) - 1) / 2) * width
        style = styles[system]
        axes.bar(
            [group + offset for group, _ in known],
            [bar.height for _, bar in known],
            width,
            color=style.color,
            hatch=style.hatch,
        )
        varying = [(group, bar) for group, bar in known if bar.low < bar.high]
        axes.errorbar(
            [group + offset for group, _ in varying],
            [bar.height for _, bar in varying],
            yerr=[[bar.height - bar.low for _, bar in varying], [bar.high - bar.height for _, bar in varying]],
            fmt="none",
            ecolor=_INK,
            elinewidth=0.8,
        )
    axes.set_xticks(range(len(groups)), [fill(group, 16) for group in groups])
    axes.set_ylim(bottom=0)
    format_axis(axes.yaxis)


def stacked_bars(axes: Axes, systems: Sequence[str], parts: Sequence[Sequence[float]]) -> None:
    """One horizontal bar a system, its parts one after the other, the sum at its end."""
    ends = [0.0] * len(systems)
    for lengths, color in zip(parts, cycle(_PART_COLORS), strict=False):
        axes.barh(range(len(systems)), lengths, 0.7, left=ends, color=color)
        ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    for row, end in enumerate(ends):
        axes.annotate(format_tick(end), (end, row), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(systems)), [fill(system, 24) for system in systems])
    axes.set_ylim(len(systems) - 0.5, -0.5)
    axes.set_xlim(0, max(ends) * 1.18 or 1)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    format_axis(axes.xaxis)


def part_patches(labels: Sequence[str]) -> list[Patch]:
    """The legend of `stacked_bars`."""
    return [Patch(facecolor=color, label=label) for label, color in zip(labels, cycle(_PART_COLORS), strict=False)]


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an ``svg`` element for a page: its text takes the page's colour, its ids begin with ``name``."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)


def standalone_svg(svg: str) -> str:
    """The element as a file of its own, readable on light and on dark pages."""
    opening, closing, rest = svg.partition(">")
    style = "<style>svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#e6edf3}}</style>"
    return f'<?xml version="1.0" encoding="utf-8"?>\n{opening}{closing}{style}{rest}'
