"""The samples of a report, by system, point and metric."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from bdlora_perf.report.schema import Kind, Metric, Report, Value
from bdlora_perf.report.statistics import Ratio, Spread, log_ratios, mean_ratio, spread
from bdlora_sglang.errors import BDLoRAError

# What a kind of report is about: speed-ups are worked out for these.
_HEADLINES: Mapping[Kind, tuple[str, ...]] = {
    "serve": ("output_throughput", "median_ttft_ms", "median_tpot_ms", "median_e2e_latency_ms"),
    "collectives": ("forward_ms", "time_us"),
    "kernels": ("time_us",),
    "estimate": ("latency_ms", "output_throughput"),
    "engine": ("decode_ms", "prefill_ms"),
}


@dataclass(frozen=True)
class Point:
    """A point of the sweep as a key: its dimensions, sorted by name."""

    items: tuple[tuple[str, Value], ...]

    @classmethod
    def of(cls, point: Mapping[str, Value]) -> "Point":
        return cls(tuple(sorted(point.items())))

    def get(self, dimension: str) -> Value:
        return dict(self.items).get(dimension)

    def number(self, dimension: str) -> float | None:
        """The dimension's value where it is a number."""
        value = self.get(dimension)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    def take(self, dimensions: Iterable[str]) -> "Point":
        """Only these dimensions."""
        kept = set(dimensions)
        return Point(tuple(item for item in self.items if item[0] in kept))


def _described(kind: str, described: Iterable[str], used: Collection[str]) -> tuple[str, ...]:
    names = tuple(described)
    unknown = sorted(set(used) - set(names))
    if unknown:
        raise BDLoRAError(f"samples: found the {kind} '{unknown[0]}', expected one that the report describes: {names}")
    return tuple(name for name in names if name in used)


class Results:
    """What every table and plot asks of a report.

    ``points`` are sorted: numbers by size, names by first appearance. ``varying`` are the dimensions with more than one
    value, ``fixed`` the others.

    Raises:
        BDLoRAError: two samples of one system at one point in one round, or a name that the report does not describe.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        self._rounds: dict[tuple[str, Point, str], dict[int, float]] = {}
        for sample in report.samples:
            point = Point.of(sample.point)
            for metric, figure in sample.metrics.items():
                rounds = self._rounds.setdefault((sample.system, point, metric), {})
                if sample.round in rounds:
                    raise BDLoRAError(
                        f"samples: found two of system '{sample.system}' at {describe(point)} in round {sample.round}, "
                        "expected one"
                    )
                rounds[sample.round] = figure
        values: dict[str, dict[Value, None]] = {}
        for sample in report.samples:
            for dimension, value in sample.point.items():
                values.setdefault(dimension, {})[value] = None
        self._order = {name: {v: i for i, v in enumerate(found)} for name, found in values.items()}
        self.points = self.in_order({point for _, point, _ in self._rounds})
        self.varying = tuple(name for name in values if len({point.get(name) for point in self.points}) > 1)
        self.fixed = {name: next(iter(found)) for name, found in values.items() if name not in self.varying}
        # In the report's order.
        self.systems = _described("system", report.systems, {system for system, _, _ in self._rounds})
        self.metrics = _described("metric", report.metrics, {metric for _, _, metric in self._rounds})
        _described("baseline", report.systems, report.baselines)

    def in_order(self, points: Iterable[Point]) -> tuple[Point, ...]:
        return tuple(sorted(points, key=self._sort_key))

    def _sort_key(self, point: Point) -> list[tuple[int, float]]:
        return [self._rank(name, point.get(name)) for name in self._order]

    def _rank(self, dimension: str, value: Value) -> tuple[int, float]:
        if isinstance(value, (int, float)):
            return 0, value
        return 1, self._order[dimension].get(value, -1)

    def parts(self, prefix: str) -> tuple[str, ...]:
        """The metrics that begin with ``prefix`` and add up to one whole."""
        return tuple(metric for metric in self.metrics if metric.startswith(prefix))

    @property
    def headlines(self) -> tuple[str, ...]:
        """The metrics that speed-ups are worked out for."""
        return tuple(
            name
            for name in _HEADLINES[self.report.kind]
            if name in self.metrics and self.report.metrics[name].better is not None
        )

    def rounds(self, system: str, point: Point, metric: str) -> dict[int, float]:
        """The value of each round in which it was measured."""
        return self._rounds.get((system, point, metric), {})

    def spread(self, system: str, point: Point, metric: str) -> Spread | None:
        values = self.rounds(system, point, metric)
        return spread(list(values.values())) if values else None

    def speed_up(self, system: str, baseline: str, metric: str, points: Sequence[Point]) -> Ratio | None:
        """Geometric mean over ``points`` of how many times better the system is; None where nothing can be compared."""
        better = self.report.metrics[metric].better
        assert better is not None, f"{metric} has no better direction"
        return mean_ratio(
            [log_ratios(self.rounds(system, p, metric), self.rounds(baseline, p, metric), better) for p in points]
        )

    def measured(self, metric: str, systems: Iterable[str]) -> tuple[Point, ...]:
        """The points at which one of the systems has this metric."""
        names = tuple(systems)
        return tuple(point for point in self.points if any(self.rounds(name, point, metric) for name in names))

    def dimensions(self, points: Iterable[Point]) -> tuple[str, ...]:
        """Of the varying dimensions those that one of the points has."""
        present = {name for point in points for name, value in point.items if value is not None}
        return tuple(name for name in self.varying if name in present)

    def groups(self, points: Iterable[Point], dimensions: Iterable[str]) -> dict[Point, list[Point]]:
        """The points that agree on ``dimensions``, by what they agree on; dimensions that do not vary are dropped."""
        names = [name for name in dimensions if name in self.varying]
        found: dict[Point, list[Point]] = {}
        for point in points:
            found.setdefault(point.take(names), []).append(point)
        return {key: found[key] for key in self.in_order(found)}


def describe(point: Point, dimensions: Iterable[str] | None = None) -> str:
    """A point in words, e.g. ``concurrency 8, uniform``: names stand for themselves."""
    found = dict(point.items)
    names = list(found) if dimensions is None else [name for name in dimensions if name in found]
    words = [v if isinstance(v := found[name], str) else f"{spaced(name)} {format_value(v)}" for name in names]
    return ", ".join(words) or "all points"


def label_with_unit(metric: Metric) -> str:
    return f"{metric.label} [{metric.unit}]" if metric.unit else metric.label


def spaced(name: str) -> str:
    """A dimension, setting or detail in words."""
    return name.replace("_", " ")


def count_rounds(measured: Iterable[Spread | Ratio | None]) -> str:
    """How many rounds stand behind some figures, e.g. ``3 rounds`` or ``2 to 3 rounds``."""
    counts = sorted({each.rounds for each in measured if each is not None})
    if counts == [1]:
        return "1 round"
    return f"{counts[0]} rounds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} rounds"


def format_value(value: Value) -> str:
    """A setting or a dimension: exactly what it is."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    return str(value)


def format_number(value: float) -> str:
    """A measured figure: four significant digits, all digits of whole numbers."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.4g}"
