"""Throughput for the trade-off, from a report of perf serve of this repository."""

import json
from pathlib import Path

import numpy as np
import pytest

from bdlora_perf.quality.speed import estimated_speeds, measured_speeds
from bdlora_perf.quality.systems import AdapterShape
from bdlora_sglang.errors import BDLoRAError

_RESULTS = Path(__file__).parents[3] / "perf" / "results"


def test_measured_speeds_are_those_of_the_report() -> None:
    report = _RESULTS / "serve-cpu-tp2"
    speeds = measured_speeds(report)
    assert set(speeds) == {AdapterShape(32, 2), AdapterShape(16)}
    raw = json.loads((report / "report.json").read_text())
    for system, shape in {"bd-2r": AdapterShape(32, 2), "lora-fully-sharded": AdapterShape(16)}.items():
        by_load: dict[int, list[float]] = {}
        for sample in raw["samples"]:
            if sample["system"] == system:
                by_load.setdefault(sample["point"]["concurrency"], []).append(sample["metrics"]["output_throughput"])
        assert len(by_load) == 3
        expected = np.exp(np.mean([np.log(np.median(values)) for values in by_load.values()]))
        assert speeds[shape] == pytest.approx(expected)


def test_a_sweep_with_ranks_in_its_points(tmp_path: Path) -> None:
    """The same report, as if r = 32 had been in it, half as fast."""
    raw = json.loads((_RESULTS / "serve-cpu-tp2" / "report.json").read_text())
    twice = []
    for sample in raw["samples"]:
        for rank, share in ((16, 1), (32, 0.5)):
            metrics = {name: value * share for name, value in sample["metrics"].items()}
            twice.append({**sample, "point": {**sample["point"], "rank": rank}, "metrics": metrics})
    raw["samples"] = twice
    details = raw["systems"]["bd-2r"]["details"]
    details.update({"r=32: rank": 64, "r=32: blocks": 2})
    (tmp_path / "report.json").write_text(json.dumps(raw))
    speeds, alone = measured_speeds(tmp_path), measured_speeds(_RESULTS / "serve-cpu-tp2")
    assert speeds == pytest.approx({**alone, AdapterShape(64, 2): alone[AdapterShape(32, 2)] / 2})


def test_estimated_speeds_are_of_whole_blocks_alone() -> None:
    shapes = {AdapterShape(16), AdapterShape(32, 8), AdapterShape(16, 4), AdapterShape(18, 3)}
    speeds = estimated_speeds("llama-3.1-8b", shapes, "a100", 8)
    assert set(speeds) == shapes - {AdapterShape(18, 3)}
    assert speeds[AdapterShape(32, 8)] > speeds[AdapterShape(16)], "the paper's claim, by arithmetic"


def test_other_reports_are_refused() -> None:
    with pytest.raises(BDLoRAError, match="found a report of perf swap, expected one of perf serve"):
        measured_speeds(_RESULTS / "swap")
