"""Two reports side by side: what became better, what became worse, and what is noise."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np
import pandas as pd
from scipy import stats

from bdlora_perf.report.frame import Results, by_round, describe, label_with_unit
from bdlora_perf.report.kinds import LAYOUTS
from bdlora_perf.report.schema import Metric, Report
from bdlora_sglang.errors import BDLoRAError

DEFAULT_TOLERANCE = 0.05
# Of what is called a change, at most this share is expected to be none (Benjamini and Hochberg).
FALSE_DISCOVERY_RATE = 0.05


class Verdict(Enum):
    """What a change is; a metric without a better direction can only have changed."""

    SAME = "no change"
    IMPROVEMENT = "improvement"
    REGRESSION = "regression"
    CHANGE = "changed"
    UNTESTED = "not tested"


@dataclass(frozen=True)
class Change:
    """One metric of one system at one point (``point`` says so) or over all, or a speed-up: medians over the rounds.

    ``ratio`` is b / a, None where a is 0; ``p_value`` is adjusted for the number of figures, None where one of the
    reports has fewer than two rounds.
    """

    system: str
    point: str
    metric: str
    a: float
    b: float
    ratio: float | None
    p_value: float | None
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

    The rule: a figure changed when its mean over rounds moved (Welch's t-test on the logarithms) with a p-value that
    stands after Benjamini and Hochberg's control of the false discovery rate, and when its median moved by more than
    ``tolerance``. A change for the worse is a regression. Tested are single figures, each metric of a system over all
    points, and the headlines' speed-ups over the baselines, which the machine's drift does not touch. What one of the
    reports has in fewer than two rounds cannot be told from noise and is not tested; an estimate has no noise, and
    ``tolerance`` alone decides.

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
    results = Results(a), Results(b)
    rounds = _rounds(results[0]), _rounds(results[1])
    common = [key for key in rounds[0] if key in rounds[1]]
    if not common:
        raise BDLoRAError("reports: found no system, point and metric that is in both, expected at least one")
    headlines = LAYOUTS[a.kind].headlines
    figures = [
        _Figure(system, describe(dict(point), results[0].varying), metric, better, (rounds[0][key], rounds[1][key]), 0)  # type: ignore[arg-type]
        for key in common
        for system, point, metric in [key]
        for better in [a.metrics[metric].better]
    ]
    figures += _over_points(a, common, *rounds)
    figures += [
        figure
        for baseline in a.baselines
        if baseline in b.baselines
        for metric in headlines
        for figure in _speed_ups(results, baseline, metric)
    ]
    p_values = np.array([_p_value(*figure.pair, exact=a.estimate and b.estimate) for figure in figures])
    families = np.array([figure.family for figure in figures])
    for family in set(families):
        tested = (families == family) & ~np.isnan(p_values)
        p_values[tested] = stats.false_discovery_control(p_values[tested]) if tested.any() else []
    changes = [_change(a, figure, float(p), tolerance) for figure, p in zip(figures, p_values, strict=True)]
    warnings = [*_warnings(a, b)]
    if count := sum(change.verdict is Verdict.UNTESTED for change in changes):
        warnings.append(f"{count} figures have fewer than two rounds in one of the reports: nothing is known of noise.")
    return Comparison(tuple(changes), _missing(*rounds), _missing(rounds[1], rounds[0]), tuple(warnings))


_Key = tuple[str, frozenset[tuple[str, object]], str]
_Pair = tuple["pd.Series[float]", "pd.Series[float]"]


@dataclass(frozen=True)
class _Figure:
    """What is compared: the values by round in both reports. False discoveries are controlled within a ``family``."""

    system: str
    where: str
    metric: str
    better: str | None
    pair: _Pair
    family: int


def _rounds(results: Results) -> "dict[_Key, pd.Series[float]]":
    """The values of every figure by round."""
    groups = results.frame.groupby(["metric", "point", "system"], sort=False)
    return {
        (system, frozenset(results.points[point].items()), metric): rows.set_index("round").value
        for (metric, point, system), rows in groups
    }


def _over_points(
    report: Report,
    common: Collection[_Key],
    rounds_a: "dict[_Key, pd.Series[float]]",
    rounds_b: "dict[_Key, pd.Series[float]]",
) -> Iterator[_Figure]:
    """Geometric means over the points of each system's metric, in the rounds that have all of them."""
    for system, metric in dict.fromkeys((system, metric) for system, _, metric in common):
        keys = [key for key in common if (key[0], key[2]) == (system, metric)]
        tables = [pd.concat([rounds[key] for key in keys], axis=1).dropna() for rounds in (rounds_a, rounds_b)]
        if len(keys) > 1 and all((table > 0).all(axis=None) for table in tables) and all(map(len, tables)):
            old, new = (np.exp(np.log(table).mean(axis=1)) for table in tables)
            family = 1 if metric in LAYOUTS[report.kind].headlines else 2
            yield _Figure(system, "all points", metric, report.metrics[metric].better, (old, new), family)


def _speed_ups(results: tuple[Results, Results], baseline: str, metric: str) -> Iterator[_Figure]:
    """Speed-ups over a baseline, over all points: drift of the machine, which neighbours share, is not in them."""
    label = results[0].report.systems[baseline].label
    logs = [found.logs(metric, baseline) for found in results if metric in found.metrics]
    for system in results[0].systems if len(logs) == 2 else ():
        old, new = (np.exp(by_round(found[found.system == system])) for found in logs)
        if len(old) and len(new):
            yield _Figure(system, f"speed-up over {label}", metric, "higher", (old, new), 3)


def _p_value(a: "pd.Series[float]", b: "pd.Series[float]", exact: bool) -> float:
    """NaN where nothing can be tested."""
    if exact:
        return 0.0
    if min(len(a), len(b)) < 2:
        return np.nan
    if a.nunique() == b.nunique() == 1:
        return float(a.iloc[0] == b.iloc[0])
    logs = (np.log(a), np.log(b)) if min(a.min(), b.min()) > 0 else (a, b)
    return float(stats.ttest_ind(*logs, equal_var=False).pvalue)


def _change(report: Report, figure: _Figure, p_value: float, tolerance: float) -> Change:
    old, new = (float(values.median()) for values in figure.pair)
    if np.isnan(p_value):
        verdict = Verdict.UNTESTED
    elif p_value > FALSE_DISCOVERY_RATE or abs(new - old) <= tolerance * abs(old):
        verdict = Verdict.SAME
    elif figure.better is None:
        verdict = Verdict.CHANGE
    else:
        verdict = Verdict.IMPROVEMENT if (new > old) == (figure.better == "higher") else Verdict.REGRESSION
    return Change(
        report.systems[figure.system].label,
        figure.where,
        label_with_unit(report.metrics[figure.metric]),
        old,
        new,
        new / old if old else None,
        None if np.isnan(p_value) else p_value,
        verdict,
    )


def _missing(keys: Collection[_Key], others: Collection[_Key]) -> tuple[str, ...]:
    """What of ``keys`` the others lack, each named as a whole: a system, a point, a metric, or one figure."""
    systems, points, metrics = (set(part) for part in zip(*others, strict=True))
    found: dict[str, None] = {}
    for key in keys:
        system, point, metric = key
        where = describe(dict(point))  # type: ignore[arg-type]
        if system not in systems:
            found[f"system {system}"] = None
        elif point not in points:
            found[f"point {where}"] = None
        elif metric not in metrics:
            found[f"metric {metric}"] = None
        elif key not in others:
            found[f"{metric} of {system} at {where}"] = None
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
