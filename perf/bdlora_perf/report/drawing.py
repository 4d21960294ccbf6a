"""What all plots are drawn with: panels, colours, grids of lines and of bars, and axes of numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns

from bdlora_perf.report.frame import Results

# Labels that are at least this part of the axis apart do not touch.
_LEAST_GAP = 1 / 7


@dataclass(frozen=True)
class Plot:
    """One drawn plot: ``svg`` is a whole file."""

    name: str
    title: str
    caption: str
    svg: str


# seaborn's grid, what its axes say (x, y), its title and its caption.
Drawing = tuple[sns.FacetGrid, str, str, str, str]


def _labels(results: Results) -> dict[str, str]:
    return {name: fill(system.label, 40) for name, system in results.report.systems.items()}


def labelled(results: Results, rows: pd.DataFrame) -> pd.DataFrame:
    """With the column ``label``, in the report's order."""
    labels = _labels(results)
    column = pd.Categorical(rows.system.map(labels), [*dict.fromkeys(labels.values())], ordered=True)
    return rows.assign(label=column.remove_unused_categories())


def colors(results: Results) -> dict[str, Any]:
    """By label, the same in every plot; the colour-blind can tell the first ten apart."""
    labels = _labels(results).values()
    return dict(zip(labels, sns.color_palette("colorblind", len(labels)), strict=True))


def panelled(panels: Sequence[tuple[str, pd.DataFrame]], most: int = 12) -> tuple[pd.DataFrame, str]:
    """One frame with the column ``panel``; of too many for a plot some, evenly spread, and a sentence about it."""
    left_out = f"{most} of {len(panels)} panels; the tables hold all." if len(panels) > most else ""
    picked = np.linspace(0, len(panels) - 1, min(most, len(panels))).round().astype(int)
    frame = pd.concat([rows.assign(panel=fill(title, 60)) for title, rows in (panels[i] for i in picked)])
    return frame.assign(panel=pd.Categorical(frame.panel, frame.panel.unique(), ordered=True)), left_out


def line_grid(rows: pd.DataFrame, x: str, wrap: int, **options: Any) -> sns.FacetGrid:
    """``value`` against ``x`` with error bars, one line a label."""
    grid = sns.relplot(
        rows, kind="line", x=x, y="value", hue="label", style="label", markers=True, dashes=False, err_style="bars",
        col="panel", col_wrap=min(wrap, rows.panel.nunique()), **options,
    )  # fmt: skip
    for panel, axes in grid.axes_dict.items():
        set_x(axes, sorted(set(rows[x][rows.panel == panel])), in_bytes=x == "bytes")
    return grid


def bars(rows: pd.DataFrame, results: Results, x: str, wrap: int = 2, **options: Any) -> sns.FacetGrid:
    return sns.catplot(
        rows, kind="bar", x=x, y="value", hue="label", palette=colors(results), col="panel",
        col_wrap=min(wrap, rows.panel.nunique()), height=2.6, aspect=1.9 if wrap > 1 else 4,
        err_kws={"linewidth": 0.9}, capsize=0.2, **options,
    )  # fmt: skip


def set_x(axes: Any, numbers: Sequence[float], in_bytes: bool) -> None:
    """An axis of the ascending ``numbers``, logarithmic where they span a wide range."""
    logarithmic = numbers[0] > 0 and numbers[-1] >= 8 * numbers[0]
    if logarithmic:
        axes.set_xscale("log", base=2)
    axes.set_xticks([], minor=True)
    axes.set_xticks(choose_ticks(numbers, logarithmic))
    axes.xaxis.set_major_formatter(format_bytes if in_bytes else format_tick)


def set_y(axes: Any, logarithmic: bool) -> None:
    """An axis from zero, or a logarithmic one."""
    if logarithmic:
        axes.set_yscale("log")
        # A logarithmic axis of less than a decade has nothing but minor ticks: 2 and 5 are enough of them.
        axes.yaxis.set_minor_formatter(lambda value, _: format_tick(value) if f"{value:e}"[0] in "25" else "")
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(format_tick)


def choose_ticks(numbers: Sequence[float], logarithmic: bool) -> list[float]:
    """Of ascending ``numbers`` the first, and each whose label does not touch the label before it."""
    places = np.log2(numbers) if logarithmic else np.array(numbers, float)
    chosen = [0]
    for i, place in enumerate(places):
        if i and place - places[chosen[-1]] >= _LEAST_GAP * (places[-1] - places[0]):
            chosen.append(i)
    return [numbers[i] for i in chosen]


def format_tick(value: float, _: object = None) -> str:
    """Short, for the axes: 1,500 and 2.5M."""
    for factor, letter in ((1e9, "G"), (1e6, "M")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def format_bytes(value: float, _: object = None) -> str:
    """In the largest binary unit that is not larger: 4 KiB."""
    power = min(4, max(0, int(np.log2(value)) // 10)) if value >= 1 else 0
    return f"{value / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
