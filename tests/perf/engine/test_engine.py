"""The command on a real server."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bdlora_cli.perf_engine import engine
from bdlora_perf.engine import bandwidth
from bdlora_perf.engine.bandwidth import shape_of, step_bytes
from bdlora_perf.report.schema import load_report
from bdlora_sglang.errors import BDLoRAError
from tests.processes import servers

app = typer.Typer()
app.command()(engine)

_TINY = "--hidden-size 512 --layers 1 --tp 1 --dtype float32 --adapters 2 --rank 4 --input-len 8"
_SIZES = "--requests 3 --requests 1 --decode-steps 16 --rounds 2"


def test_two_systems_on_one_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_COPY_BYTES", 2**22)
    output, work = tmp_path / "report", tmp_path / "work"
    options = [*_TINY.split(), *_SIZES.split()]
    result = CliRunner().invoke(app, [*options, "--output", str(output), "--work", str(work)])
    assert result.exit_code == 0, (result.output, result.exception)
    assert servers() == []

    report = load_report(output)
    assert report.kind == "engine" and report.failures == ()
    assert list(report.systems) == ["base", "bd-2r"] and report.baselines == ("base",)
    assert report.systems["bd-2r"].details["rank"] == 8
    assert "rank 0: " in str(report.systems["base"].details["ranks at tp 1"])
    assert {"copy, one core (GB/s)", "parameters read by a step"} <= report.settings.keys()
    # No batch was split: one prefill a turn.
    assert not any("were prefilled in" in note for note in report.notes)
    log = (work / "logs" / "engine-tp1-float32.log").read_text()
    assert log.count("Prefill batch, #new-seq: 3") >= 2 * 2

    found = {(s.system, s.round, s.point["requests"], s.point["phase"]) for s in report.samples}
    assert len(found) == len(report.samples) == 2 * 2 * 2 * 2
    num_bytes = step_bytes(shape_of(str(report.settings["model"])), 1, 4)
    for sample in report.samples:
        assert {name: sample.point[name] for name in ("tp", "dtype")} == {"tp": 1, "dtype": "float32"}
        if sample.point["phase"] == "prefill":
            assert set(sample.metrics) == {"prefill_ms"} and sample.metrics["prefill_ms"] > 0
            continue
        assert set(sample.metrics) == {"decode_ms", "decode_bandwidth_gbs"}
        read = sample.metrics["decode_bandwidth_gbs"] * sample.metrics["decode_ms"] * 1e6
        assert read == pytest.approx(num_bytes)
    assert {path.stem for path in (output / "plots").iterdir()} == {"speed-up", "decode", "prefill", "bandwidth"}
    assert "Decode step against requests" in (output / "report.md").read_text()


def test_a_server_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_COPY_BYTES", 2**22)
    paths = ["--output", str(tmp_path / "report"), "--work", str(tmp_path / "work")]
    result = CliRunner().invoke(app, [*_TINY.split(), *paths, "--", "--no-such-flag"])
    assert isinstance(result.exception, BDLoRAError)
    message = str(result.exception)
    assert "the server ended with exit code" in message
    assert f"The end of {tmp_path / 'work' / 'logs' / 'engine-tp1-float32.log'}" in message
    assert "--no-such-flag" in message.partition("The end of")[2]
    assert servers() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], "--dtype: found 'int8', expected one of float32, bfloat16, float16"),
        (["--tp", "3"], "--tp: found 3"),
        (["--tp", "8", "--rank", "2"], "--rank 2: found rank 4 for bd-2r, expected a multiple of TP 8"),
        (["--before", "/no/such/checkout"], "--before /no/such/checkout: found no"),
    ],
    ids=["dtype", "tp", "rank", "before"],
)
def test_wrong_options(arguments: list[str], message: str, tmp_path: Path) -> None:
    paths = ["--output", str(tmp_path / "report"), "--work", str(tmp_path / "work")]
    result = CliRunner().invoke(app, ["--hidden-size", "512", "--layers", "1", *arguments, *paths])
    assert isinstance(result.exception, BDLoRAError), result.output
    assert message in str(result.exception)
