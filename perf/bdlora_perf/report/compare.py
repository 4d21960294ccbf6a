"""Two reports side by side: what became better, what became worse, and what is noise."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from statistics import median

from bdlora_perf.report.results import Point, Results, describe, label_with_unit
from bdlora_perf.report.schema import Metric, Report
from bdlora_perf.report.statistics import median_interval
from bdlora_sglang.errors import BDLoRAError

DEFAULT_TOLERANCE = 0.05


class Verdict(Enum):
    """What a change is; a metric without a better direction can only have changed."""

    SAME = "no change"
    IMPROVEMENT = "improvement"
    REGRESSION = "regression"
    CHANGE = "changed"


@dataclass(frozen=True)
class Change:
    """One metric of one system at one point: medians, and the larger half-width of their intervals in ``noise``.

    ``ratio`` is b / a, None where a is 0; ``noise`` is relative to the median, None where a report has one round.
    """

    system: str
    point: str
    metric: str
    a: float
    b: float
    ratio: float | None
    noise: float | None
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """``only_in_a`` and ``only_in_b`` name what has no counterpart, ``warnings`` what makes figures incomparable."""

    changes: tuple[Change, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def regressions(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.verdict is Verdict.REGRESSION)


def compare_reports(a: Report, b: Report, tolerance: float = DEFAULT_TOLERANCE) -> Comparison:
    """Match systems, points and metrics of two reports by name.

    The rule: a figure changed when its median moved by more than ``tolerance`` of a's median, and the intervals of the
    two medians (`median_interval`) do not overlap. With one round an interval is a point, and ``tolerance`` alone
    decides. A change for the worse is a regression.

    Raises:
        BDLoRAError: the reports are of different kinds, have nothing in common, or measure a metric in two units.
    """
    if a.kind != b.kind:
        raise BDLoRAError(f"reports: found the kinds '{a.kind}' and '{b.kind}', expected two of one kind")
    for name in a.metrics.keys() & b.metrics.keys():
        if (a.metrics[name].unit, a.metrics[name].better) != (b.metrics[name].unit, b.metrics[name].better):
            raise BDLoRAError(
                f"metric '{name}': found {_sense(a.metrics[name])} and {_sense(b.metrics[name])}, expected one meaning"
            )
    results_a, results_b = Results(a), Results(b)
    # Dictionaries are sets that keep their order.
    in_a, in_b = dict.fromkeys(_keys(results_a)), dict.fromkeys(_keys(results_b))
    common = [key for key in in_a if key in in_b]
    if not common:
        raise BDLoRAError("reports: found no system, point and metric that is in both, expected at least one")
    return Comparison(
        tuple(_change(results_a, results_b, *key, tolerance) for key in common),
        _missing(in_a, in_b),
        _missing(in_b, in_a),
        tuple(_warnings(a, b)),
    )


_Key = tuple[str, Point, str]


def _keys(results: Results) -> Iterator[_Key]:
    for metric in results.metrics:
        for point in results.points:
            for system in results.systems:
                if results.rounds(system, point, metric):
                    yield system, point, metric


def _change(a: Results, b: Results, system: str, point: Point, metric: str, tolerance: float) -> Change:
    values = [list(results.rounds(system, point, metric).values()) for results in (a, b)]
    old, new = map(median, values)
    (low_a, high_a), (low_b, high_b) = map(median_interval, values)
    beyond_noise = low_b > high_a or high_b < low_a
    better = a.report.metrics[metric].better
    if not beyond_noise or abs(new - old) <= tolerance * abs(old):
        verdict = Verdict.SAME
    elif better is None:
        verdict = Verdict.CHANGE
    else:
        verdict = Verdict.IMPROVEMENT if (new > old) == (better == "higher") else Verdict.REGRESSION
    noise = None
    if min(map(len, values)) > 1 and old and new:
        noise = max((high_a - low_a) / 2 / abs(old), (high_b - low_b) / 2 / abs(new))
    return Change(
        a.report.systems[system].label,
        describe(point, a.varying),
        label_with_unit(a.report.metrics[metric]),
        old,
        new,
        new / old if old else None,
        noise,
        verdict,
    )


def _missing(keys: Collection[_Key], others: Collection[_Key]) -> tuple[str, ...]:
    """What of ``keys`` the others lack, each named as a whole: a system, a point, a metric, or one figure."""
    systems, points, metrics = (set(part) for part in zip(*others, strict=True))
    found: dict[str, None] = {}
    for system, point, metric in keys:
        if system not in systems:
            found[f"system {system}"] = None
        elif point not in points:
            found[f"point {describe(point)}"] = None
        elif metric not in metrics:
            found[f"metric {metric}"] = None
        elif (system, point, metric) not in others:
            found[f"{metric} of {system} at {describe(point)}"] = None
    return tuple(found)


def _warnings(a: Report, b: Report) -> Iterator[str]:
    if a.estimate != b.estimate:
        yield "One report is an estimate, the other was measured."
    for what, left, right in (
        ("processors", a.machine.processor, b.machine.processor),
        ("numbers of cores", a.machine.cores, b.machine.cores),
        ("GPUs", a.machine.gpus, b.machine.gpus),
    ):
        if left != right:
            yield f"Measured on different machines: the {what} differ."
    for name in sorted(a.settings.keys() | b.settings.keys()):
        if a.settings.get(name) != b.settings.get(name):
            yield f"Different settings: {name} is {a.settings.get(name)} and {b.settings.get(name)}."


def _sense(metric: Metric) -> str:
    return f"[{metric.unit}], better {metric.better or 'neither way'}"
