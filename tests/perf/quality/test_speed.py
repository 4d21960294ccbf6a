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


def test_a_sweep_with_ranks_in_its_points() -> None:
    assert set(measured_speeds(_RESULTS / "serve-cpu-tp4")) == {
        AdapterShape(32, 4),
        AdapterShape(64, 4),
        AdapterShape(16),
    }


def test_estimated_speeds_are_of_whole_blocks_alone() -> None:
    shapes = {AdapterShape(16), AdapterShape(32, 8), AdapterShape(16, 4), AdapterShape(18, 3)}
    speeds = estimated_speeds("llama-3.1-8b", shapes, "a100", 8)
    assert set(speeds) == shapes - {AdapterShape(18, 3)}
    assert speeds[AdapterShape(32, 8)] > speeds[AdapterShape(16)], "the paper's claim, by arithmetic"


def test_other_reports_are_refused() -> None:
    with pytest.raises(BDLoRAError, match="found a report of perf swap, expected one of perf serve"):
        measured_speeds(_RESULTS / "swap")
