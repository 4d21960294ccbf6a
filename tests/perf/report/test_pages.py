"""The pages: both hold the same tables, and the tables hold what numpy and scipy make of the samples."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt
from scipy import stats

from bdlora_perf.report.drawing import choose_ticks
from bdlora_perf.report.render import ESTIMATE_LABEL, write_report
from bdlora_perf.report.schema import Failure, Report, Sample
from bdlora_sglang.errors import BDLoRAError
from tests.perf.report.samples import KINDS, make_report

Rows = list[list[str]]


class _Tables(HTMLParser):
    """Every table by its heading, as rows of cells; the first row holds the columns."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[tuple[str, Rows]] = []
        self.heading, self._text = "", ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "table":
            self.tables.append((self.heading, []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        self._text = ""

    def handle_data(self, data: str) -> None:
        self._text += data

    def handle_endtag(self, tag: str) -> None:
        if tag in ("h1", "h2", "h3", "summary"):
            self.heading = self._text.strip()
        elif tag in ("th", "td"):
            self.tables[-1][1][-1].append(self._text.strip())


@cache
def _html_tables(folder: Path) -> list[tuple[str, Rows]]:
    return _Tables((folder / "report.html").read_text()).tables


def _markdown_tables(folder: Path) -> list[tuple[str, Rows]]:
    return _Tables(MarkdownIt("commonmark").enable("table").render((folder / "report.md").read_text())).tables


def _numbers(cell: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"[\d,.]+(?:e-?\d+)?", cell)]


def _table(folder: Path, title: str) -> tuple[list[str], Rows]:
    (rows,) = [rows for heading, rows in _html_tables(folder) if heading == title]
    return rows[0], rows[1:]


@pytest.mark.parametrize("kind", KINDS)
def test_markdown_and_html_hold_the_same_tables(kind: str, folders: Mapping[str, Path]) -> None:
    tables = _html_tables(folders[kind])
    assert tables == _markdown_tables(folders[kind])
    assert len(tables) > 5
    assert all(len(row) == len(rows[0]) for _, rows in tables for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_every_median_and_spread(kind: str, reports: Mapping[str, Report], folders: Mapping[str, Path]) -> None:
    """Each cell of each metric's table, against numpy on the samples that the row's and column's names select."""
    report = reports[kind]
    labels = {system.label: name for name, system in report.systems.items()}
    for metric, described in report.metrics.items():
        columns, rows = _table(folders[kind], described.label + (f" [{described.unit}]" if described.unit else ""))
        dimensions = [column.replace(" ", "_") for column in columns if column not in labels and column != "IQR"]
        filled = 0
        for row in rows:
            noises = []
            for label, cell in zip(columns[len(dimensions) :], row[len(dimensions) :], strict=True):
                if label == "IQR":
                    assert _numbers(cell) == pytest.approx([100 * max(noises)], abs=0.06)
                    continue
                values = _select(report, labels[label], dict(zip(dimensions, row, strict=False)), metric)
                if not values:
                    assert cell == "-"
                    continue
                filled += 1
                first, median, third = np.percentile(values, (25, 50, 75))
                noises.append((third - first) / median if median else 0)
                # A cell without brackets: nothing varies.
                found = _numbers(cell)
                assert (found + 2 * found)[:3] == pytest.approx([median, min(values), max(values)], rel=6e-4)
        measured = {(s.system, tuple(s.point.items())) for s in report.samples if metric in s.metrics}
        assert filled == len(measured)


def _select(report: Report, system: str, point: Mapping[str, str], metric: str) -> list[float]:
    """The metric of the samples whose dimensions look like those of a row."""
    return [
        sample.metrics[metric]
        for sample in report.samples
        if sample.system == system and metric in sample.metrics
        if all(str(sample.point.get(name, "-")) == shown.replace(",", "") for name, shown in point.items())
    ]


@pytest.mark.parametrize(
    ("kind", "metric", "label", "baseline", "power"),
    [
        pytest.param("serve", "output_throughput", "Output throughput", "s_lora", 1, id="higher is better"),
        pytest.param("serve", "median_ttft_ms", "TTFT, median", "base", -1, id="lower is better"),
        pytest.param("kernels", "time_us", "Time", "csgmv", -1, id="kernels"),
    ],
)
def test_speed_ups(
    kind: str,
    metric: str,
    label: str,
    baseline: str,
    power: int,
    reports: Mapping[str, Report],
    folders: Mapping[str, Path],
) -> None:
    """Each cell of the table of points, against scipy's confidence interval of the neighbours' log-ratios."""
    report = reports[kind]
    labels = {system.label: name for name, system in report.systems.items()}
    columns, rows = _table(folders[kind], f"Speed-up over {report.systems[baseline].label}: {label}")
    dimensions = [column for column in columns if column not in labels]
    *points, mean = rows
    assert mean[0] == "geometric mean" and len(points) > 3
    of_mean: dict[str, list[np.ndarray]] = {}
    for row in points:
        point = dict(zip(dimensions, row, strict=False))
        own = np.array(_select(report, baseline, point, metric))
        for name, cell in zip(columns[len(dimensions) :], row[len(dimensions) :], strict=True):
            system = np.array(_select(report, labels[name], point, metric))
            if len(system) == 0:
                assert cell == "-"
                continue
            logs = power * np.log(system / own)
            of_mean.setdefault(name, []).append(logs)
            assert _numbers(cell) == pytest.approx(_expected(logs), abs=0.0051)
    for name, cell in zip(columns[len(dimensions) :], mean[len(dimensions) :], strict=True):
        assert _numbers(cell) == pytest.approx(_expected(np.mean(of_mean[name], axis=0)), abs=0.0051)


def _expected(logs: np.ndarray) -> list[float]:
    interval = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    return [float(np.exp(value)) for value in (np.mean(logs), interval.low, interval.high)]


def test_paired_differences(reports: Mapping[str, Report], folders: Mapping[str, Path]) -> None:
    """Each cell against scipy's paired t-test of the rounds; p is adjusted over all cells but the means over all."""
    report = reports["quality"]
    systems = {system.label: name for name, system in report.systems.items()}
    title = "held-out loss [nats]: difference to Sample lora"
    columns, rows = _table(folders["quality"], title)
    assert columns[:2] == ["task", "r"] and rows[-1][0] == "mean over all"
    found: dict[str, list[str]] = {"point": [], "task": [], "all": rows[-1][2:]}
    expected: dict[str, list[Any]] = {"point": [], "task": [], "all": []}
    differences: dict[tuple[str, str], list[np.ndarray]] = {}
    for task, r, *cells in rows[:-1]:
        own = np.array(_select(report, "lora", {"task": task, "r": r}, "loss"))
        for label, cell in zip(columns[2:], cells, strict=True):
            values = np.array(_select(report, systems[label], {"task": task, "r": r}, "loss"))
            if not len(values):
                assert cell == "-"
                continue
            for group in (task, "all"):
                differences.setdefault((label, group), []).append(values - own)
            found["point"].append(cell)
            expected["point"].append(stats.ttest_rel(values, own))
    tasks, means = _table(folders["quality"], f"{title}, means over points")
    assert tasks == ["", "code", "json", "all"] and [row[0] for row in means] == columns[2:]
    for label, *cells in means:
        found["task"] += cells[:-1]
        expected["task"] += [stats.ttest_1samp(np.mean(differences[label, task], axis=0), 0) for task in tasks[1:-1]]
        expected["all"].append(stats.ttest_1samp(np.mean(differences[label, "all"], axis=0), 0))
    assert [row[-1] for row in means] == found["all"]
    for family, tests in expected.items():
        p_values = [test.pvalue for test in tests]
        for cell, test, p in zip(
            found[family], tests, p_values if family == "all" else stats.false_discovery_control(p_values), strict=True
        ):
            interval = test.confidence_interval(0.95)
            match = re.fullmatch(r"([-+.\d]+) \(([-+.\d]+) to ([-+.\d]+), p (=|<) ([.\d]+)\)", cell)
            assert match, cell
            shown = [float(match[i]) for i in (1, 2, 3)]
            assert shown == pytest.approx([(interval.low + interval.high) / 2, interval.low, interval.high], abs=6e-5)
            assert p < 0.001 if match[4] == "<" else float(match[5]) == pytest.approx(p, abs=6e-4)


def test_one_round_has_no_interval_and_the_page_says_so(folders: Mapping[str, Path]) -> None:
    _, rows = _table(folders["estimate"], "Speed-up over S-LoRA: Time of a step")
    # By hand, decode at concurrency 1: (9 + 1.5 + 0.96 + 5.6 + 0.9) / (9 + 1.5 + 0 + 2 + 0.9) = 17.96 / 13.4.
    assert rows[0][:3] == ["decode", "1", "1.34"]
    for page in ("report.md", "report.html"):
        assert "Fewer than two rounds: no confidence interval" in (folders["estimate"] / page).read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_an_estimate_says_so_loudly(kind: str, folders: Mapping[str, Path]) -> None:
    for page in ("report.md", "report.html"):
        assert (ESTIMATE_LABEL in (folders[kind] / page).read_text()) == (kind in ("estimate", "kernels-static"))


def test_every_plot_of_a_page_is_a_file_and_back(folders: Mapping[str, Path]) -> None:
    expected = {
        "serve": {"speed-up", "throughput", "goodput", "latency", "memory"},
        "collectives": {"collectives", "time"},
        "kernels": {"speed-up", "time", "bandwidth", "arithmetic", "ceiling"},
        "kernels-static": {"speed-up", "time", "serial", "by-rank"},
        "estimate": {"speed-up", "breakdown", "memory"},
        "engine": {"speed-up", "decode", "prefill", "bandwidth"},
        "swap": {"speed-up", "latency", "gap", "prepare"},
        "quality": {"perplexity", "accuracy", "speed", "conversion", "initial-values"},
        "convert": {"speed-up", "time", "rate", "memory"},
    }
    for kind, folder in folders.items():
        shown = re.findall(r"\]\(plots/(.*)\.svg\)", (folder / "report.md").read_text())
        assert set(shown) == {path.stem for path in (folder / "plots").iterdir()} == expected[kind]
        assert (folder / "report.html").read_text().count("<img") == len(shown)


def test_one_load_is_bars_not_a_line_of_one_point(reports: Mapping[str, Report], tmp_path: Path) -> None:
    samples = tuple(s for s in reports["serve"].samples if s.point["concurrency"] == 8)
    write_report(make_report("serve", samples=samples), tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert "### Output throughput\n\n![Output throughput](plots/throughput.svg)" in markdown
    assert "against concurrency" not in markdown


def test_a_logarithmic_axis_of_less_than_a_decade_has_plain_labels(tmp_path: Path) -> None:
    report = make_report("collectives")
    samples = [
        sample.model_copy(update={"metrics": {"time_us": 150.0 + 10 * sample.round}})
        for sample in report.samples
        if "time_us" in sample.metrics
    ]
    write_report(report.model_copy(update={"samples": tuple(samples)}), tmp_path)
    drawn = (tmp_path / "plots" / "time.svg").read_text()
    assert "math" not in drawn


def test_labels_of_an_axis_do_not_touch() -> None:
    sizes = [256, 384, 512, 1024, 4096, 8192, 12288, 16384, 32768, 65536, 262144, 1048576, 4194304]
    assert choose_ticks(sizes, logarithmic=True) == [256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304]
    assert choose_ticks([1, 2, 4, 32], logarithmic=False) == [1, 32]
    assert choose_ticks([8], logarithmic=True) == [8]


def test_failures_are_told_with_their_log_and_run_nothing(folders: Mapping[str, Path]) -> None:
    html, markdown = ((folders["serve"] / page).read_text() for page in ("report.html", "report.md"))
    for page in (html, MarkdownIt("commonmark").render(markdown)):
        assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
        assert "SGLang triton_v2 at concurrency 1, skewed" in page
        assert "the server ended with code -9" in page and "1 part of the sweep failed" in page
        assert "Odd characters: | * _ ` &lt; &gt; &amp; [x](y) # $1$." in page


def test_nothing_measured_is_still_a_report(tmp_path: Path) -> None:
    failure = Failure(system="base", message="the server never started")
    report = make_report("serve", samples=(), failures=(failure, failure))
    assert [path.name for path in write_report(report, tmp_path)] == ["report.json", "report.md"]
    write_report(report, tmp_path, html=True)
    for page in ("report.md", "report.html"):
        text = (tmp_path / page).read_text()
        assert "No sample was taken" in text and "2 parts of the sweep failed" in text


def test_the_same_report_gives_the_same_bytes(folders: Mapping[str, Path], tmp_path: Path) -> None:
    """In another process with other hashes."""
    script = (
        "import sys; from pathlib import Path\n"
        "from tests.perf.report.samples import make_report; from bdlora_perf.report.render import write_report\n"
        "for kind in ('collectives', 'estimate'): write_report(make_report(kind), Path(sys.argv[1]) / kind, True)\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env=environment)
    for kind in ("collectives", "estimate"):
        files = sorted(path.relative_to(folders[kind]) for path in folders[kind].rglob("*.*"))
        assert len(files) >= 5
        for file in files:
            assert (tmp_path / kind / file).read_bytes() == (folders[kind] / file).read_bytes(), file


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        pytest.param({"round": 0}, "found two of system 'base' at concurrency 1, decode in round 0", id="twice"),
        pytest.param({"system": "ghost"}, "found the system 'ghost'", id="unknown system"),
        pytest.param({"metrics": {"speed": 1.0}, "round": 9}, "found the metric 'speed'", id="unknown metric"),
    ],
)
def test_samples_that_contradict_the_report(sample: dict[str, object], message: str, tmp_path: Path) -> None:
    """The page is refused; the raw figures are safe."""
    report = make_report("estimate")
    odd = Sample.model_validate({**report.samples[0].model_dump(), **sample})
    with pytest.raises(BDLoRAError, match=message):
        write_report(report.model_copy(update={"samples": (*report.samples, odd)}), tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["report.json"]
