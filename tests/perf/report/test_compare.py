"""Two reports side by side: the rule for a regression on figures by hand, and the command with its exit codes."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import typer
from scipy import stats
from typer.testing import CliRunner, Result

from bdlora_cli.perf_compare import compare
from bdlora_perf.report.compare import Verdict, compare_reports
from bdlora_perf.report.schema import Metric, Report, Sample, System, load_report, save_report
from bdlora_sglang.errors import BDLoRAError
from tests.perf.report.samples import MACHINE, make_report

Figures = Mapping[str, Sequence[float]]
METRICS = {
    "time_ms": Metric(label="Time", unit="ms", better="lower"),
    "rate": Metric(label="Rate", unit="1/s", better="higher"),
    "size": Metric(label="Size", unit="GiB"),
}


def make(figures: Figures, system: str = "bd", point: Mapping[str, int] | None = None, **changes: object) -> Report:
    """A report of one system at one point: the rounds of each metric."""
    rounds = max(map(len, figures.values()))
    samples = [
        Sample(
            system=system,
            point=dict(point or {"tokens": 1}),
            round=i,
            metrics={name: values[i] for name, values in figures.items() if i < len(values)},
        )
        for i in range(rounds)
    ]
    return make_report(
        "kernels", systems={system: System(label=system)}, metrics=METRICS, baselines=(), samples=samples, **changes
    )


@pytest.mark.parametrize(
    ("metric", "a", "b", "verdict"),
    [
        pytest.param("time_ms", [10, 10.1, 10.2], [10, 10.1, 10.2], Verdict.SAME, id="the same"),
        pytest.param("time_ms", [10, 10.1, 10.2], [10.3, 10.4, 10.5], Verdict.SAME, id="within the tolerance"),
        pytest.param("time_ms", [10, 11, 14], [13.9, 14, 16], Verdict.SAME, id="within the noise"),
        pytest.param("time_ms", [10, 10.5, 11], [12.1, 13, 14], Verdict.REGRESSION, id="slower"),
        pytest.param("time_ms", [12.1, 13, 14], [10, 10.5, 11], Verdict.IMPROVEMENT, id="faster"),
        pytest.param("rate", [12.1, 13, 14], [10, 10.5, 11], Verdict.REGRESSION, id="lower rate"),
        pytest.param("rate", [10, 10.5, 11], [12.1, 13, 14], Verdict.IMPROVEMENT, id="higher rate"),
        pytest.param("size", [1, 1, 1], [2, 2, 2], Verdict.CHANGE, id="neither way is better"),
        pytest.param("time_ms", [10], [20], Verdict.UNTESTED, id="one round: nothing is known of noise"),
        pytest.param("time_ms", [0, 0], [1, 1], Verdict.REGRESSION, id="from nothing"),
    ],
)
def test_the_rule(metric: str, a: Sequence[float], b: Sequence[float], verdict: Verdict) -> None:
    (change,) = compare_reports(make({metric: a}), make({metric: b})).changes
    assert change.verdict is verdict


def test_ratio_and_p_value_by_hand() -> None:
    a, b = [9.0, 10, 11], [19.0, 20, 21]
    (change,) = compare_reports(make({"time_ms": a}), make({"time_ms": b})).changes
    expected = stats.ttest_ind(np.log(a), np.log(b), equal_var=False).pvalue
    assert (change.a, change.b, change.ratio, change.p_value) == (10, 20, 2, pytest.approx(expected))


COMMITTED = sorted(Path("perf/results").glob("serve-*/report.json"))
TIMED = ("throughput", "_ms")


def part(report: Report, rounds: Collection[int], slowed: str = "") -> Report:
    """Some rounds of a report; every timed figure of the system ``slowed`` is a tenth worse."""
    samples = []
    for sample in (sample for sample in report.samples if sample.round in rounds):
        metrics = dict(sample.metrics)
        for name in (name for name in metrics if name.endswith(TIMED) and sample.system == slowed):
            metrics[name] *= 1.1 if report.metrics[name].better == "lower" else 1 / 1.1
        samples.append(sample.model_copy(update={"metrics": metrics}))
    return report.model_copy(update={"samples": tuple(samples)})


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_identical_code_passes_and_a_slowdown_of_a_tenth_fails(path: Path) -> None:
    """On committed measurements: figures by the hundred, noisy and dependent on one another."""
    report = load_report(path)
    rounds = sorted({sample.round for sample in report.samples})
    half = len(rounds) // 2
    for a, b in ((rounds[:1], rounds[1:2]), (rounds[::2], rounds[1::2]), (rounds[:half], rounds[half:])):
        assert compare_reports(part(report, a), part(report, b)).regressions == ()
    slowed = compare_reports(report, part(report, rounds, "bd-2r")).regressions
    assert slowed and {change.system for change in slowed} == {report.systems["bd-2r"].label}


def test_noise_alone_is_rarely_a_regression() -> None:
    """Thirty pairs of reports of twenty figures each, of one distribution; without control it would be nineteen."""
    rng = np.random.default_rng(0)
    names = [f"time_{i}_ms" for i in range(20)]
    metrics = dict.fromkeys(names, METRICS["time_ms"])
    wrong = 0
    for _ in range(30):
        a, b = (
            make({name: list(np.exp(rng.normal(0, 0.2, 5))) for name in names}).model_copy(update={"metrics": metrics})
            for _ in range(2)
        )
        wrong += bool(compare_reports(a, b).regressions)
    assert wrong <= 5


def test_what_is_in_one_report_only_is_named() -> None:
    both = make({"time_ms": [1.0]})
    more = both.model_copy(
        update={
            "systems": {**both.systems, "new": System(label="New")},
            "samples": (
                *both.samples,
                Sample(system="bd", point={"tokens": 1}, round=1, metrics={"rate": 3.0}),
                Sample(system="bd", point={"tokens": 8}, round=0, metrics={"time_ms": 3.0}),
                Sample(system="new", point={"tokens": 1}, round=0, metrics={"time_ms": 3.0}),
            ),
        }
    )
    comparison = compare_reports(both, more)
    assert comparison.only_in_a == ()
    assert set(comparison.only_in_b) == {"system new", "metric rate", "point tokens 8"}
    assert compare_reports(more, both).only_in_a == comparison.only_in_b


@pytest.mark.parametrize(
    ("other", "message"),
    [
        pytest.param(make_report("estimate"), "found the kinds 'kernels' and 'estimate'", id="other kind"),
        pytest.param(make({"time_ms": [1.0]}, system="other"), "no system, point and metric", id="nothing in common"),
        pytest.param(
            make({"time_ms": [1.0]}).model_copy(update={"metrics": {"time_ms": Metric(label="Time", unit="s")}}),
            r"metric 'time_ms': found \[ms\], better lower and \[s\]",
            id="other unit",
        ),
    ],
)
def test_reports_that_cannot_be_compared(other: Report, message: str) -> None:
    with pytest.raises(BDLoRAError, match=message):
        compare_reports(make({"time_ms": [1.0]}), other)


def test_other_machines_and_settings_are_warned_of() -> None:
    a = make({"time_ms": [1.0, 2.0]})
    b = make({"time_ms": [1.0]}, machine=MACHINE.model_copy(update={"gpus": ()}), settings={"dtype": "float16"})
    warnings = compare_reports(a, b).warnings
    assert "Measured on different machines: the GPUs differ." in warnings
    assert "Different settings: dtype is bfloat16 and float16." in warnings
    assert compare_reports(a, a).warnings == ()


def bdlora_perf_compare(folder: Path, a: Report, b: Report, *options: str) -> Result:
    paths = []
    for name, report in (("a", a), ("b", b)):
        (folder / name).mkdir()
        paths.append(str(save_report(report, folder / name)))
    app = typer.Typer()
    app.command()(compare)
    return CliRunner().invoke(app, [*paths, *options], env={"COLUMNS": "120"})


def test_a_regression_is_exit_code_1(tmp_path: Path) -> None:
    figures = {"time_ms": [10.0, 11, 12], "rate": [5.0, 5, 5]}
    result = bdlora_perf_compare(tmp_path, make(figures), make({**figures, "time_ms": [20.0, 22, 24]}))
    assert result.exit_code == 1
    words = result.output.split()
    assert words[words.index("11") : words.index("regression") : 2][:3] == ["11", "22", "2.000"]
    assert "2 figures compared: no change 1, improvement 0, regression 1, changed 0, not tested 0" in result.output


def test_no_regression_is_exit_code_0(tmp_path: Path) -> None:
    report = make({"time_ms": [10.0, 11, 12]})
    result = bdlora_perf_compare(tmp_path, report, report, "--only-changes")
    assert result.exit_code == 0
    assert "Time" not in result.output and "no change 1," in result.output


def test_the_tolerance_is_an_option(tmp_path: Path) -> None:
    reports = make({"time_ms": [10, 10.1]}), make({"time_ms": [11, 11.1]})
    assert compare_reports(*reports).regressions
    assert bdlora_perf_compare(tmp_path, *reports, "--tolerance", "0.2").exit_code == 0
