"""Two reports side by side: the rule for a regression on figures by hand, and the command with its exit codes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from bdlora_cli.perf_compare import compare
from bdlora_perf.report.compare import Verdict, compare_reports
from bdlora_perf.report.schema import Metric, Report, Sample, System, save_report
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
        pytest.param("time_ms", [10, 11, 12], [12.1, 13, 14], Verdict.REGRESSION, id="slower"),
        pytest.param("time_ms", [12.1, 13, 14], [10, 11, 12], Verdict.IMPROVEMENT, id="faster"),
        pytest.param("rate", [12.1, 13, 14], [10, 11, 12], Verdict.REGRESSION, id="lower rate"),
        pytest.param("rate", [10, 11, 12], [12.1, 13, 14], Verdict.IMPROVEMENT, id="higher rate"),
        pytest.param("size", [1, 1, 1], [2, 2, 2], Verdict.CHANGE, id="neither way is better"),
        pytest.param("time_ms", [10], [10.4], Verdict.SAME, id="one round: tolerance alone"),
        pytest.param("time_ms", [10], [10.6], Verdict.REGRESSION, id="one round: beyond it"),
        pytest.param("time_ms", [0, 0], [1, 1], Verdict.REGRESSION, id="from nothing"),
        # Of ten rounds the interval is the second to the ninth, so that one outlier hides nothing.
        pytest.param("time_ms", [10] * 9 + [99], [12] * 9 + [1], Verdict.REGRESSION, id="outliers"),
    ],
)
def test_the_rule(metric: str, a: Sequence[float], b: Sequence[float], verdict: Verdict) -> None:
    (change,) = compare_reports(make({metric: a}), make({metric: b})).changes
    assert change.verdict is verdict


def test_ratio_and_noise_by_hand() -> None:
    """Medians 10 and 20; half-widths (11 - 9) / 2 / 10 = 10% and (23 - 19) / 2 / 20 = 10%, then 5% against it."""
    (change,) = compare_reports(make({"time_ms": [9, 10, 11]}), make({"time_ms": [19, 20, 21]})).changes
    assert (change.a, change.b, change.ratio, change.noise) == (10, 20, 2, pytest.approx(0.1))
    (change,) = compare_reports(make({"time_ms": [0]}), make({"time_ms": [1]})).changes
    assert (change.ratio, change.noise) == (None, None)


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
    a = make({"time_ms": [1.0]})
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
    assert words[words.index("11") : words.index("regression") : 2] == ["11", "22", "2.000", "±9.1%"]
    assert "2 figures compared: no change 1, improvement 0, regression 1, changed 0" in result.output


def test_no_regression_is_exit_code_0(tmp_path: Path) -> None:
    report = make({"time_ms": [10.0, 11, 12]})
    result = bdlora_perf_compare(tmp_path, report, report, "--only-changes")
    assert result.exit_code == 0
    assert "Time" not in result.output and "no change 1," in result.output


def test_the_tolerance_is_an_option(tmp_path: Path) -> None:
    result = bdlora_perf_compare(tmp_path, make({"time_ms": [10]}), make({"time_ms": [11]}), "--tolerance", "0.2")
    assert result.exit_code == 0
