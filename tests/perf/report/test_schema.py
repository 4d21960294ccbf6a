"""report.json: what is written is read back, damage is refused by name, and nothing is left half-written."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from bdlora_perf.report.render import write_report
from bdlora_perf.report.schema import Report, Sample, load_report, save_report
from bdlora_sglang.errors import BDLoRAError
from tests.perf.report.samples import KINDS, make_report


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind: str, reports: Mapping[str, Report], folders: Mapping[str, Path]) -> None:
    assert load_report(folders[kind]) == load_report(folders[kind] / "report.json") == reports[kind]


def _change(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    def damage(text: str) -> str:
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return damage


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        pytest.param(lambda text: "# a report", "the file: found", id="not JSON"),
        pytest.param(lambda text: text[: len(text) // 2], "the file: found", id="cut off"),
        pytest.param(_change(lambda c: c.update(schema_version=2)), "schema_version: found '2'", id="other version"),
        pytest.param(_change(lambda c: c.pop("machine")), "machine: found", id="missing field"),
        pytest.param(_change(lambda c: c.update(colour="red")), "colour: found 'red'", id="unknown field"),
        pytest.param(_change(lambda c: c.update(kind="speed")), "kind: found 'speed'", id="unknown kind"),
        pytest.param(
            _change(lambda c: c["samples"][3]["metrics"].update(latency_ms="fast")),
            "samples.3.metrics.latency_ms: found 'fast'",
            id="figure that is none",
        ),
    ],
)  # fmt: skip
def test_damage_is_refused_by_name(damage: Callable[[str], str], named: str, tmp_path: Path) -> None:
    path = save_report(make_report("estimate"), tmp_path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(BDLoRAError) as refused:
        load_report(tmp_path)
    assert str(refused.value).startswith(f"{path}: {named}")
    assert "expected a report of bdlora perf with schema version 1" in str(refused.value)


def test_no_report_there(tmp_path: Path) -> None:
    with pytest.raises(BDLoRAError, match=r"report\.json: found No such file"):
        load_report(tmp_path)


@pytest.mark.parametrize("figure", [float("nan"), float("inf")])
def test_figures_that_json_does_not_know_are_refused(figure: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        Sample(system="a", point={}, round=0, metrics={"time_us": figure})


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(BDLoRAError, match="taken/plots: found Not a directory"):
        write_report(make_report("estimate"), tmp_path / "taken")


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    """No file may grow beyond 4000 bytes: to the process that is what a full disk is."""
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from tests.perf.report.samples import make_report; from bdlora_perf.report.render import write_report\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        "write_report(make_report('estimate'), Path(sys.argv[1]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", script, str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    expected = "out/report.json: found File too large, expected to be able to write the report"
    assert expected in done.stderr.splitlines()[-1]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
