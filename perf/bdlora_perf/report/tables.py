"""The tables of a report's pages: every figure is worked out and formatted here, once for all templates."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import pandas as pd

from bdlora_perf.report.frame import (
    CONFIDENCE,
    Ratio,
    Results,
    count_rounds,
    format_number,
    format_value,
    label_with_unit,
    mean_ratio,
    spaced,
)
from bdlora_perf.report.kinds import LAYOUTS
from bdlora_perf.report.schema import Point, Report

# How many rows a reader takes in at a glance; longer tables are folded away.
_FOLD_ABOVE = 24


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
        return len(self.rows) > _FOLD_ABOVE


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
    details = tuple(dict.fromkeys(chain.from_iterable(system.details for system in report.systems.values())))
    rows = tuple(
        (spaced(name), *(format_value(system.details.get(name)) for system in report.systems.values()))
        for name in details
    )
    columns = ("", *(system.label for system in report.systems.values()))
    return Table("", columns, rows, texts=len(columns))


def speed_up_tables(results: Results) -> list[Table]:
    """For each headline and baseline: geometric means over groups of points, and every point."""
    return [
        table
        for metric in results.metrics
        if metric in LAYOUTS[results.report.kind].headlines
        for baseline in results.report.baselines
        if len(logs := results.logs(metric, baseline))
        for table in _speed_up_tables(results, metric, baseline, logs)
    ]


def _speed_up_tables(results: Results, metric: str, baseline: str, logs: pd.DataFrame) -> list[Table]:
    rows = results.rows(metric, [baseline])
    each_point = results.groups(set(rows.point), results.dimensions(rows))
    groups = results.groups(set(rows.point), LAYOUTS[results.report.kind].grouped_by)
    title = f"Speed-up over {results.report.systems[baseline].label}: {results.report.metrics[metric].label}"
    tables = []
    if 1 < len(groups) < len(each_point):
        tables.append(_speed_up_table(results, f"{title}, geometric means", metric, logs, groups))
    return [*tables, _speed_up_table(results, title, metric, logs, each_point)]


def _speed_up_table(
    results: Results, title: str, metric: str, logs: pd.DataFrame, groups: list[tuple[Point, list[int]]]
) -> Table:
    systems = [name for name in results.systems if (logs.system == name).any()]
    names = [name for name in results.varying if any(name in point for point, _ in groups)]
    if len(groups) > 1:
        groups = [*groups, ({}, [number for _, points in groups for number in points])]
    ratios = [
        [mean_ratio(logs[(logs.system == name) & logs.point.isin(points)]) for name in systems] for _, points in groups
    ]
    rows = [
        (*point_cells(point, names), *map(format_ratio, row)) for (point, _), row in zip(groups, ratios, strict=True)
    ]
    if len(groups) > 1:
        rows[-1] = ("geometric mean", *[""] * (len(names) - 1), *rows[-1][max(1, len(names)) :])
    columns = (*point_columns(names), *(results.report.systems[name].label for name in systems))
    caption = _speed_up_caption(results.report.metrics[metric].better == "lower", [r for row in ratios for r in row])
    return Table(title, columns, tuple(rows), max(1, len(names)), caption)


def _speed_up_caption(lower_is_better: bool, ratios: Iterable[Ratio | None]) -> str:
    known = [ratio for ratio in ratios if ratio]
    sense = "baseline / system" if lower_is_better else "system / baseline"
    text = f"{sense}: more than 1 is better. Means are over the points that a system shares with the baseline."
    without = sum(ratio.interval is None for ratio in known)
    if without == len(known):
        return f"{text} Fewer than two rounds: no confidence interval."
    text += f" Geometric mean of the ratios within each of {count_rounds(ratio.rounds for ratio in known)}"
    text += f"; in brackets its {CONFIDENCE:.0%} confidence interval (Student's t on the logarithms)."
    return f"{text} No brackets: fewer than two rounds, no interval." if without else text


def median_tables(results: Results) -> list[Table]:
    """For each metric: every system at every point."""
    return [_median_table(results, metric) for metric in results.metrics]


def _median_table(results: Results, metric: str) -> Table:
    described, rows = results.report.metrics[metric], results.rows(metric)
    systems = [name for name in results.systems if (rows.system == name).any()]
    names = results.dimensions(rows)
    values = rows.groupby(["point", "system"]).value
    spreads = pd.DataFrame(
        {"median": values.median(), "low": values.min(), "high": values.max(), "rounds": values.size()}
    )
    spreads["iqr"] = ((values.quantile(0.75) - values.quantile(0.25)) / spreads["median"].abs()).fillna(0)
    spread_rows = dict(zip(spreads.index, spreads.itertuples(index=False), strict=True))
    numbers = sorted(set(rows.point))
    cells = [
        (*point_cells(results.points[n], names), *(format_spread(spread_rows.get((n, name))) for name in systems))
        for n in numbers
    ]
    columns = (*point_columns(names), *(results.report.systems[name].label for name in systems))
    caption = {"higher": "Higher is better. ", "lower": "Lower is better. ", None: ""}[described.better]
    if (spreads.rounds > 1).any():
        largest = spreads.iqr.groupby(level="point").max()
        cells = [(*row, f"{largest[number]:.1%}") for number, row in zip(numbers, cells, strict=True)]
        columns = (*columns, "IQR")
        caption += (
            f"Median (smallest to largest) of {count_rounds(spreads.rounds)}. "
            "IQR: the largest interquartile range of the systems, relative to its median."
        )
    else:
        caption += "One value each: no spread."
    return Table(label_with_unit(described), columns, tuple(cells), max(1, len(names)), caption)


def format_spread(spread: object) -> str:
    """Median (smallest to largest), or the one value."""
    if spread is None:
        return "-"
    median, low, high = (getattr(spread, name) for name in ("median", "low", "high"))
    return format_number(median) + ("" if low == high else f" ({format_number(low)} to {format_number(high)})")


def format_ratio(ratio: Ratio | None) -> str:
    """A speed-up with its confidence interval, to two decimals (tiny ones to three digits)."""
    if ratio is None:
        return "-"
    if ratio.interval is None:
        return _decimals(ratio.value)
    return f"{_decimals(ratio.value)} ({' to '.join(map(_decimals, ratio.interval))})"


def _decimals(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def point_columns(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(spaced(name) for name in names) or ("",)


def point_cells(point: Point, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(format_value(point.get(name)) for name in names) or ("all points",)
