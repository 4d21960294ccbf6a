"""Axes of numbers: where their ticks are, and what these say."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

# Labels that are at least this part of the axis apart do not touch.
_LEAST_GAP = 1 / 7


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def set_axes(axes: Any, numbers: Sequence[float], bytes_: bool, log_y: bool, from_zero: bool = True) -> None:
    logarithmic = numbers[0] > 0 and numbers[-1] >= 8 * numbers[0]
    if logarithmic:
        axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(choose_ticks(numbers, logarithmic)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: (format_bytes if bytes_ else format_tick)(value)))
    if log_y:
        axes.set_yscale("log")
        # A logarithmic axis of less than a decade has nothing but minor ticks: 2 and 5 are enough of them.
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: format_tick(v) if f"{v:e}"[0] in "25" else ""))
    elif from_zero:
        axes.set_ylim(bottom=0)
    else:
        return  # a narrow range needs all digits: matplotlib's own ticks
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))


def choose_ticks(numbers: Sequence[float], logarithmic: bool) -> list[float]:
    """Of ascending ``numbers`` the first, and each whose label does not touch the label before it."""
    places = np.log2(numbers) if logarithmic else np.array(numbers, float)
    chosen = [0]
    for i, place in enumerate(places):
        if i and place - places[chosen[-1]] >= _LEAST_GAP * (places[-1] - places[0]):
            chosen.append(i)
    return [numbers[i] for i in chosen]


def format_tick(value: float) -> str:
    """Short, for the axes: 1,500 and 2.5M."""
    for factor, letter in ((1e9, "G"), (1e6, "M")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def format_bytes(value: float) -> str:
    """In the largest binary unit that is not larger: 4 KiB."""
    power = min(4, max(0, int(np.log2(value)) // 10)) if value >= 1 else 0
    return f"{value / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
