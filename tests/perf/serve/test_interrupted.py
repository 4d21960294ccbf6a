"""The command on real servers: one is killed in mid-sweep, then the command gets Ctrl-C."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from bdlora_perf.report.schema import load_report
from bdlora_perf.serve.load import Api, make_requests, run_load
from bdlora_perf.serve.servers import RunningServer, adapter_names, find_target
from bdlora_perf.serve.workload import Workload
from bdlora_sglang.errors import BDLoRAError

_COMMAND = [sys.executable, "-m", "bdlora_cli.main", "perf", "serve"]
_OPTIONS = "--layers 1 --systems base,bd-2r --concurrency 2 --input-len 16 --output-len 4 --adapters 2 --rank 4"
_ROUNDS = 1000  # more than can be run before the interruption
_POINT = {
    "concurrency": 2,
    "input_len": 16,
    "output_len": 4,
    "adapters": 2,
    "slots": 2,
    "distribution": "uniform",
}
_PATIENCE_SECONDS = 400


def wait_for(happened: Callable[[], bool], command: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not happened():
        assert command.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def check_requests(server: RunningServer, api: Api) -> None:
    """Each API answers with as many tokens as it is asked for; a server that ends, ends the run."""
    target = find_target(server, api)
    workload = Workload(3, None, 16, 5, 1.0, 2, 2, "distinct", 1.0, 4, 6)
    outcomes = run_load(target, make_requests(workload, ["adapter-0", "adapter-1"], 0), 3, lambda: True)
    assert [outcome.error for outcome in outcomes] == [""] * 6
    assert [outcome.output_len for outcome in outcomes] == [5] * 6
    assert all(0 < outcome.ttft <= outcome.latency for outcome in outcomes)
    assert [outcome.adapter for outcome in outcomes] == ["adapter-0", "adapter-1"] * 3
    with pytest.raises(BDLoRAError, match="the server ended during the run"):
        run_load(
            target, make_requests(replace(workload, output_len=200), ["adapter-0", "adapter-1"], 0), 3, lambda: False
        )


def test_a_dead_server_and_an_interruption(tmp_path: Path) -> None:
    log, output, work = tmp_path / "log", tmp_path / "report", tmp_path / "work"
    result = output / "report.json"  # so far
    options = [*_OPTIONS.split(), "--num-prompts", "4", "--rounds", str(_ROUNDS)]
    with log.open("wb") as file:
        command = subprocess.Popen(
            [*_COMMAND, *options, "--output", str(output), "--work", str(work)],
            stdout=file,
            stderr=subprocess.STDOUT,
            # A shell lets what it turns in the background ignore Ctrl-C, and we may be such.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    processes: list[psutil.Process] = []
    try:

        def runs_since(start: int) -> bool:
            """Three results after ``start``, so that one run at least began after it."""
            if result.is_file():
                seen.add(result.stat().st_mtime_ns)
            return sum(when > start for when in seen) >= 3

        seen: set[int] = set()
        wait_for(lambda: runs_since(0), command, log)
        processes = psutil.Process(command.pid).children(recursive=True)
        (victim,) = (p for p in processes if any("adapter-0=" in word for word in p.cmdline()))
        words = victim.cmdline()
        given = RunningServer("x", f"http://127.0.0.1:{words[words.index('--port') + 1]}/")
        given.wait_until_healthy()
        assert adapter_names(given) == ["adapter-0", "adapter-1"]
        for api in ("sglang", "vllm"):
            check_requests(given, api)
        assert find_target(given).api == "sglang"
        killed = time.time_ns()
        victim.kill()
        wait_for(lambda: runs_since(killed), command, log)
        command.send_signal(signal.SIGINT)
        assert command.wait(120) == 130, log.read_text()
    finally:
        command.kill()
        _, alive = psutil.wait_procs(processes, timeout=30)
        for process in alive:
            process.kill()
    assert alive == []

    report = load_report(output)
    (failure,) = report.failures
    assert (failure.system, failure.message) == ("bd-2r", "the server ended with exit code -9")
    assert "POST /" in failure.log_tail
    assert {**failure.point, **_POINT} == _POINT
    rounds = {name: [s.round for s in report.samples if s.system == name] for name in ("base", "bd-2r")}
    assert len(rounds["base"]) > len(rounds["bd-2r"]) > 0
    assert rounds["base"] == list(range(1, len(rounds["base"]) + 1))
    for name in ("base", "bd-2r"):
        runs = report.systems[name].details
        assert (runs["engine"], runs["device"], runs["graphs"]) == ("SGLang 0.5.23", "cpu", "recorded decode steps")
        assert runs["KV cache (tokens)"] == report.systems["base"].details["KV cache (tokens)"]
        assert runs["slots"] == (2 if name == "bd-2r" else None)
    (note,) = report.notes
    assert note.startswith("Interrupted: ") and f"of {2 * _ROUNDS} turns" in note
    assert report.baselines == ("base",)
    for sample in report.samples:
        metrics = sample.metrics
        assert sample.point == _POINT
        assert metrics["failed_requests"] == 0
        # Four requests of 16 and 4 tokens, all of them completed.
        assert abs(metrics["input_throughput"] / metrics["request_throughput"] - 16) < 1e-6
        assert abs(metrics["output_throughput"] / metrics["request_throughput"] - 4) < 1e-6
        assert 0 < metrics["median_ttft_ms"] < metrics["median_e2e_latency_ms"]
        assert ("memory_lora_gib" in metrics) == ("adapter_slot_mib" in metrics) == (sample.system == "bd-2r")
    lora = next(sample.metrics["memory_lora_gib"] for sample in report.samples if sample.system == "bd-2r")
    parameters = report.systems["bd-2r"].details["r=4: parameters"]
    assert isinstance(parameters, int)
    # Two slots in float32; SGLang's own padding of a slot is small.
    assert abs(lora * 2**30 / (2 * 4 * parameters) - 1) < 0.05
