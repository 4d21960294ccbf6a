"""Two reports side by side: what became better, what became worse, and what is noise."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from bdlora_perf.report.frame import Results, adjust, by_round
from bdlora_perf.report.kinds import LAYOUTS
from bdlora_perf.report.schema import Report
from bdlora_perf.report.words import describe, label_with_unit
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
        one, other = (f"[{m.unit}], better {m.better or 'neither way'}" for m in (a.metrics[name], b.metrics[name]))
        if one != other:
            raise BDLoRAError(f"metric '{name}': found {one} and {other}, expected one meaning")
    results = Results(a), Results(b)
    rows = [_single(found) for found in results]
    single = [own.groupby(_FIGURE, sort=False).value.agg(list).to_dict() for own in rows]
    common = [figure for figure in single[0] if figure in single[1]]
    if not common:
        raise BDLoRAError("reports: found no system, point and metric that is in both, expected at least one")
    shared = [own.merge(pd.DataFrame(common, columns=_FIGURE), on=_FIGURE) for own in rows]
    old, new = (own | _over_points(*of_report) for own, *of_report in zip(single, results, shared, strict=True))
    pairs = {figure: (values, new[figure]) for figure, values in old.items() if figure in new}
    exact = a.estimate and b.estimate
    p_values = pd.Series([0.0 if exact else _p_value(*pair) for pair in pairs.values()])
    p_values = p_values.groupby([family for family, *_ in pairs]).transform(adjust)
    changes = [
        _change(results[0], figure, pair, p_value, tolerance)
        for (figure, pair), p_value in zip(pairs.items(), p_values, strict=True)
    ]
    warnings = [*_warnings(a, b)]
    if count := sum(change.verdict is Verdict.UNTESTED for change in changes):
        warnings.append(f"{count} figures have fewer than two rounds in one of the reports: nothing is known of noise.")
    return Comparison(tuple(changes), _missing(*single), _missing(single[1], single[0]), tuple(warnings))


# What figures are matched by. ``where`` is a point (what it is, for the reports number theirs differently), all points,
# or a baseline. False discoveries are controlled within each family.
_FIGURE = ["family", "system", "where", "metric"]
_SINGLE, _HEADLINE, _MEAN, _SPEED_UP = "single", "mean of a headline", "mean", "speed-up"
_Figure = tuple[str, str, Any, str]


def _single(results: Results) -> pd.DataFrame:
    """The frame of a report, with what its figures are matched by."""
    points = {number: frozenset(point.items()) for number, point in enumerate(results.points)}
    return results.frame.assign(family=_SINGLE, where=results.frame.point.map(points))


def _over_points(results: Results, rows: pd.DataFrame) -> dict[_Figure, list[float]]:
    """Geometric means over the points of each system's metric in ``rows``, and of each speed-up, by round.

    Of the rounds that have all of the points. Drift of the machine, which neighbours share, is not in speed-ups.
    """
    headlines = [name for name in LAYOUTS[results.report.kind].headlines if name in results.metrics]
    rows = rows.groupby(["system", "metric"]).filter(lambda own: own.point.nunique() > 1 and (own.value > 0).all())
    family = np.where(rows.metric.isin(headlines), _HEADLINE, _MEAN)
    logs = [rows.assign(value=np.log(rows.value), family=family, where="all points")]
    for baseline, metric in product(results.report.baselines, headlines):
        speed_ups = results.logs(metric, baseline).assign(family=_SPEED_UP, where=baseline)
        logs += [speed_ups[speed_ups.system == name] for name in results.systems]
    by_figure = pd.concat(logs).groupby(_FIGURE, sort=False)
    return {figure: [*means] for figure, own in by_figure if len(means := np.exp(by_round(own)))}


def _p_value(a: Sequence[float], b: Sequence[float]) -> float:
    """NaN where nothing can be tested."""
    if min(len(a), len(b)) < 2:
        return np.nan
    if len({*a}) == len({*b}) == 1:
        return float(a[0] == b[0])
    logs = (np.log(a), np.log(b)) if min(*a, *b) > 0 else (a, b)
    return float(stats.ttest_ind(*logs, equal_var=False).pvalue)


def _change(
    results: Results, figure: _Figure, pair: tuple[Sequence[float], Sequence[float]], p_value: float, tolerance: float
) -> Change:
    family, system, where, metric = figure
    report, better = results.report, results.report.metrics[metric].better
    if family == _SINGLE:
        where = describe(dict(where), results.varying)
    elif family == _SPEED_UP:
        where, better = f"speed-up over {report.systems[where].label}", "higher"
    old, new = (float(np.median(values)) for values in pair)
    if np.isnan(p_value):
        verdict = Verdict.UNTESTED
    elif p_value > FALSE_DISCOVERY_RATE or abs(new - old) <= tolerance * abs(old):
        verdict = Verdict.SAME
    elif better is None:
        verdict = Verdict.CHANGE
    else:
        verdict = Verdict.IMPROVEMENT if (new > old) == (better == "higher") else Verdict.REGRESSION
    label, unit = report.systems[system].label, label_with_unit(report.metrics[metric])
    known = None if np.isnan(p_value) else p_value
    return Change(label, where, unit, old, new, new / old if old else None, known, verdict)


def _missing(figures: Collection[_Figure], others: Collection[_Figure]) -> tuple[str, ...]:
    """What of single figures the others lack, each named as a whole: a system, a point, a metric, or one figure."""
    _, systems, points, metrics = (set(part) for part in zip(*others, strict=True))

    def name(system: str, point: Any, metric: str) -> str:
        if system not in systems:
            return f"system {system}"
        if point not in points:
            return f"point {describe(dict(point))}"
        return f"{metric} of {system} at {describe(dict(point))}" if metric in metrics else f"metric {metric}"

    return tuple(dict.fromkeys(name(*figure[1:]) for figure in figures if figure not in others))


def _warnings(a: Report, b: Report) -> Iterator[str]:
    if a.estimate != b.estimate:
        yield "One report is an estimate, the other was measured."
    for what, field in {"processors": "processor", "numbers of cores": "cores", "GPUs": "gpus"}.items():
        if getattr(a.machine, field) != getattr(b.machine, field):
            yield f"Measured on different machines: the {what} differ."
    for name in sorted(a.settings.keys() | b.settings.keys()):
        if a.settings.get(name) != b.settings.get(name):
            yield f"Different settings: {name} is {a.settings.get(name)} and {b.settings.get(name)}."
