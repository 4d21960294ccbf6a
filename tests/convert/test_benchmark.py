"""The benchmark of conversions, on a model of one small layer."""

from pathlib import Path

import pytest

from bdlora_perf.estimate.model_shape import ModelShape
from bdlora_perf.report.render import write_report
from bdlora_perf.report.run import Run
from bdlora_perf.report.schema import load_report
from bdlora_perf.synthetic.convert_benchmark import DENSE, METRICS, NBLOCKS, RUNS, THIN, benchmark
from bdlora_sglang.convert import ConvertOptions

SHAPE = ModelShape(
    "Small", hidden=256, layers=1, heads=8, kv_heads=4, head_dim=32, intermediate=512, vocabulary=8, tied=True
)


def test_every_conversion_and_the_reference_are_in_the_report(tmp_path: Path) -> None:
    report = benchmark(Run("command", 0), {1: SHAPE}, 1, ConvertOptions(NBLOCKS, force=True), tmp_path, "Idle.")
    assert not list(tmp_path.iterdir()), "the adapters are removed"
    figures = {sample.system: sample.metrics for sample in report.samples}
    assert figures.keys() == {*RUNS, DENSE, THIN} == report.systems.keys()
    lossless, by_ratio, by_error = (figures[name] for name in RUNS)
    assert lossless.keys() == METRICS.keys()
    assert lossless["error"] == 0 and lossless["param_ratio"] > 1
    assert by_ratio["param_ratio"] <= 0.875 and by_error["param_ratio"] <= 0.875
    assert 0 < figures[DENSE]["error"] == pytest.approx(figures[THIN]["error"], rel=1e-4)
    assert all(0 <= run["above_mib"] < run["peak_mib"] for run in (lossless, by_ratio, by_error))
    assert "Idle." in report.notes
    written = write_report(report, tmp_path / "report")
    assert {path.stem for path in written if path.suffix == ".svg"} == {"speed-up", "time", "rate", "memory"}
    assert load_report(tmp_path / "report") == report
