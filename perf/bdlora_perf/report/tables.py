"""The tables of a report's pages: every figure is worked out and formatted here, once for all renderers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from bdlora_perf.report.results import (
    Point,
    Results,
    count_rounds,
    format_number,
    format_value,
    label_with_unit,
    spaced,
)
from bdlora_perf.report.schema import Kind, Metric, Report
from bdlora_perf.report.statistics import CONFIDENCE, Ratio, Spread

# How many rows a reader takes in at a glance; longer tables are folded away.
_FOLD_ABOVE = 24
# Over what the speed-ups are summarised, beside the mean over everything: dimensions, by kind of report.
GROUPED_BY: Mapping[Kind, tuple[str, ...]] = {
    "serve": ("concurrency", "request_rate"),
    "collectives": ("operation",),
    "kernels": ("phase", "layer"),
    "estimate": ("phase", "concurrency", "rank"),
    "engine": ("tp",),
}


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


def settings_table(results: Results) -> Table | None:
    """The settings that all systems and points share."""
    settings = {**results.report.settings, **results.fixed}
    rows = tuple((spaced(name), format_value(value)) for name, value in settings.items())
    return Table("Settings", ("setting", "value"), rows, texts=2) if rows else None


def systems_table(report: Report) -> Table:
    """One row a system, one column a detail."""
    details = tuple(dict.fromkeys(chain.from_iterable(system.details for system in report.systems.values())))
    rows = tuple(
        (system.label, *(format_value(system.details[name]) if name in system.details else "-" for name in details))
        for system in report.systems.values()
    )
    columns = ("system", *(spaced(name) for name in details))
    return Table("", columns, rows, texts=len(columns))


def speed_up_tables(results: Results) -> list[Table]:
    """For each metric and baseline: geometric means over groups of points, and every point."""
    return [
        table
        for metric in results.headlines
        for baseline in results.report.baselines
        if (systems := compared_systems(results, baseline, metric))
        for table in _speed_up_tables(results, metric, baseline, systems)
    ]


def compared_systems(results: Results, baseline: str, metric: str) -> tuple[str, ...]:
    """The systems that have a ratio to this baseline anywhere."""
    return tuple(
        name
        for name in results.systems
        if name != baseline and results.speed_up(name, baseline, metric, results.points) is not None
    )


def _speed_up_tables(results: Results, metric: str, baseline: str, systems: Sequence[str]) -> list[Table]:
    points = results.measured(metric, (baseline,))
    each_point = results.groups(points, results.dimensions(points))
    groups = results.groups(points, GROUPED_BY[results.report.kind])
    title = f"Speed-up over {results.report.systems[baseline].label}: {results.report.metrics[metric].label}"
    tables = []
    if 1 < len(groups) < len(each_point):
        tables.append(_speed_up_table(results, f"{title}, geometric means", metric, baseline, systems, groups))
    tables.append(_speed_up_table(results, title, metric, baseline, systems, each_point))
    return tables


def _speed_up_table(
    results: Results,
    title: str,
    metric: str,
    baseline: str,
    systems: Sequence[str],
    groups: Mapping[Point, Sequence[Point]],
) -> Table:
    names = results.dimensions(groups)
    ratios: list[Ratio] = []

    def cells(points: Sequence[Point]) -> Iterator[str]:
        for system in systems:
            ratio = results.speed_up(system, baseline, metric, points)
            ratios.extend([ratio] if ratio else [])
            yield format_ratio(ratio)

    rows = [(*_point_cells(group, names), *cells(points)) for group, points in groups.items()]
    if len(groups) > 1:
        padding = [""] * (len(names) - 1)
        rows.append(("geometric mean", *padding, *cells([p for points in groups.values() for p in points])))
    columns = (*_point_columns(names), *(results.report.systems[system].label for system in systems))
    caption = _speed_up_caption(results.report.metrics[metric], ratios)
    return Table(title, columns, tuple(rows), max(1, len(names)), caption)


def _speed_up_caption(metric: Metric, ratios: Sequence[Ratio]) -> str:
    sense = "baseline / system" if metric.better == "lower" else "system / baseline"
    text = f"{sense}: more than 1 is better. Means are over the points that a system shares with the baseline."
    without = sum(ratio.interval is None for ratio in ratios)
    if without == len(ratios):
        return f"{text} Fewer than two rounds: no confidence interval."
    text += f" Geometric mean of the ratios within each of {count_rounds(ratios)}"
    text += f"; in brackets its {CONFIDENCE:.0%} confidence interval (Student's t on the logarithms)."
    return f"{text} No brackets: fewer than two rounds, no interval." if without else text


def median_tables(results: Results) -> list[Table]:
    """For each metric: every system at every point."""
    return [_median_table(results, metric) for metric in results.metrics]


def _median_table(results: Results, metric: str) -> Table:
    described = results.report.metrics[metric]
    systems = tuple(name for name in results.systems if results.measured(metric, (name,)))
    points = results.measured(metric, systems)
    names = results.dimensions(points)
    by_point = [[results.spread(name, point, metric) for name in systems] for point in points]
    known = [[spread for spread in found if spread is not None] for found in by_point]
    rows = [
        (*_point_cells(point, names), *map(format_spread, found)) for point, found in zip(points, by_point, strict=True)
    ]
    columns = (*_point_columns(names), *(results.report.systems[name].label for name in systems))
    caption = {"higher": "Higher is better. ", "lower": "Lower is better. ", None: ""}[described.better]
    if any(spread.rounds > 1 for spreads in known for spread in spreads):
        rows = [(*row, f"{max(s.relative_iqr for s in spreads):.1%}") for row, spreads in zip(rows, known, strict=True)]
        columns = (*columns, "IQR")
        caption += (
            f"Median (smallest to largest) of {count_rounds(chain.from_iterable(known))}. "
            "IQR: the largest interquartile range of the systems, relative to its median."
        )
    else:
        caption += "One value each: no spread."
    return Table(label_with_unit(described), columns, tuple(rows), max(1, len(names)), caption)


def format_spread(spread: Spread | None) -> str:
    """Median (smallest to largest), or the one value."""
    if spread is None:
        return "-"
    median = format_number(spread.median)
    if spread.low == spread.high:
        return median
    return f"{median} ({format_number(spread.low)} to {format_number(spread.high)})"


def format_ratio(ratio: Ratio | None) -> str:
    """A speed-up with its confidence interval, to two decimals (tiny ones to three digits)."""
    if ratio is None:
        return "-"
    if ratio.interval is None:
        return _decimals(ratio.value)
    return f"{_decimals(ratio.value)} ({' to '.join(map(_decimals, ratio.interval))})"


def _decimals(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _point_columns(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(spaced(name) for name in names) or ("",)


def _point_cells(point: Point, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(format_value(point.get(name)) for name in names) or ("all points",)
