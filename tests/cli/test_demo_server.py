"""The demo's server process: why it did not start, what of its output is shown, and that nothing of it stays behind."""

import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from bdlora_cli.demo_server import DemoServer, running_server
from bdlora_sglang.errors import BDLoRAError

# A server with a child, both deaf to SIGTERM.
_STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""

_LOG = """\
[2026-01-01 00:00:00] server_args=ServerArgs(...)
No GPU here: serving on the CPU platform, without CUDA graphs.
[2026-01-01 00:00:01 TP0] Load weight begin.
 Adapters at TP 2
| adapter | kind |
[2026-01-01 00:00:02 TP1] Load weight end.
BD-LoRA is in place: 12 layers, 8 slots of 288.0 KiB per GPU, no communication for LoRA.
[2026-01-01 00:00:03] The server is fired up and ready to roll!
"""


def start(program: str, log: Path) -> DemoServer:
    return DemoServer([sys.executable, "-c", program], "http://127.0.0.1:9", log)


def test_a_server_that_does_not_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    server = start("print('first'); print('no such model'); raise SystemExit(3)", tmp_path / "server.log")
    with pytest.raises(BDLoRAError, match=r"(?s)exit code 3.*server\.log.*no such model"):
        server.wait_until_healthy()
    server.stop()


def test_stop_leaves_no_process_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bdlora_perf.server_process._STOP_SECONDS", 0.2)
    log = tmp_path / "server.log"
    server = start(_STUBBORN, log)
    while not log.read_text().strip():
        time.sleep(0.05)
    child = psutil.Process(int(log.read_text()))
    server.stop()
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_what_launch_says_is_picked_out_of_the_log(tmp_path: Path) -> None:
    server = start("", tmp_path / "server.log")
    server.stop()
    server.log.write_text(_LOG)
    expected = [line for line in _LOG.splitlines() if not line.startswith("[")]
    assert server.start_report() == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_stops_the_server(number: signal.Signals, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    with (
        pytest.raises(SystemExit) as caught,
        running_server(tmp_path, 1, tmp_path / "adapters", tmp_path / "log", lambda command: None) as server,
    ):
        signal.raise_signal(number)
    assert caught.value.code == 128 + number
    assert server.exit_code is not None
    assert signal.getsignal(number) is before
