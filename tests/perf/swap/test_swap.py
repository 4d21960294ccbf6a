"""The command on a real server, and the little that it works out itself."""

import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bdlora_cli.perf_swap import swap
from bdlora_perf.engine.beside import turns
from bdlora_perf.report.schema import load_report
from bdlora_perf.swap.measure import SwapOptions
from bdlora_perf.swap.stream import TokenStream, longest_gap_ms
from bdlora_sglang.errors import BDLoRAError

app = typer.Typer()
app.command()(swap)

_TINY = "--hidden-size 512 --layers 1 --tp 1 --rank 4 --loads 3 --rounds 1"


def test_one_server(tmp_path: Path) -> None:
    output = tmp_path / "report"
    result = CliRunner().invoke(app, [*_TINY.split(), "--output", str(output), "--work", str(tmp_path / "work")])
    assert result.exit_code == 0, (result.output, result.exception)
    report = load_report(output)
    assert report.kind == "swap" and report.failures == () and list(report.systems) == ["now"]
    by_point = {tuple(sample.point.items()): sample.metrics for sample in report.samples}
    swapped = by_point.pop((("tp", 1), ("rank", 4)))
    assert set(swapped) == {
        *(f"{which}_{what}_ms" for which in ("median", "p99") for what in ("load", "cold", "warm")),
        "load_cpu_ms",
        "gap_ms",
        "quiet_gap_ms",
    }
    assert all(value >= 0 for value in swapped.values()) and swapped["median_load_ms"] > 0
    assert set(by_point) == {(("requests", requests),) for requests in (1, 32, 256)}
    for metrics in by_point.values():
        # What is described again costs more than what is not, whatever the machine.
        assert metrics["prepare_new_us"] > metrics["prepare_same_us"]
    assert "Longest gap between tokens while adapters load" in (output / "report.md").read_text()


def test_the_longest_gap_beside_the_loads() -> None:
    times = [0.0, 0.1, 0.3, 0.35, 0.9]
    assert longest_gap_ms(times, 0.0, 0.3) == pytest.approx(200)
    assert longest_gap_ms(times, 0.32, 0.34) == pytest.approx(50), "loads that begin and end between two tokens"
    assert longest_gap_ms(times, 0.32, 0.5) == pytest.approx(550)
    with pytest.raises(BDLoRAError, match="found no two tokens beside the loads"):
        longest_gap_ms(times, 1.0, 2.0)


def test_a_refused_stream_says_why() -> None:
    class Refuses(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b"input_ids: found 908")

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(BDLoRAError, match=r"found status 400 \(input_ids: found 908\), expected 200"):
            TokenStream(f"http://127.0.0.1:{server.server_port}", [908], 1)


def test_systems_take_turns() -> None:
    options = SwapOptions(
        model="",
        vocabulary=1,
        tps=[1],
        ranks=[8, 64],
        loads=1,
        rounds=2,
        seed=0,
        before=Path("older"),
        dtype="float32",
        server_flags=[],
        work=Path(),
        command="",
    )
    order = [(turn.round, turn.size, turn.contender.name) for turn in turns(options.contenders, options.ranks, 2)]
    assert len(order) == 8
    assert [system for _, _, system in order[:4]] == ["now", "before", "before", "now"]
    assert [system for _, _, system in order[4:]] == ["before", "now", "now", "before"]
    assert [contender.name for contender in replace(options, before=None).contenders] == ["now"]
