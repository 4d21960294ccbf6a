"""What can be said before anything is measured, and what a server that does not start says."""

import json
import re
import socket
from pathlib import Path

import psutil
import pytest
import typer
from typer.testing import CliRunner

from bdlora_cli.perf_serve import serve
from bdlora_perf.report.schema import Failure
from bdlora_perf.serve.adapters import matched_adapter, synthetic_model
from bdlora_perf.serve.benchmark import run_benchmark
from bdlora_perf.serve.contenders import Contender, Given, Ours
from bdlora_perf.serve.options import ServeOptions
from bdlora_perf.serve.report import main_baseline_failures
from bdlora_perf.serve.run import SweepRunner, schedule
from bdlora_perf.serve.servers import RunningServer
from bdlora_perf.serve.systems import SYSTEMS
from bdlora_perf.serve.workload import Sweep
from bdlora_sglang.errors import BDLoRAError
from tests.perf.report.samples import make_report
from tests.perf.serve.test_adapters import largest_file
from tests.processes import servers

app = typer.Typer()
app.command()(serve)


class Silent:
    """A watcher that nobody looks at."""

    def doing(self, what: str) -> None:
        pass

    def turn_is_over(self) -> None:
        pass


def refusal(*arguments: object) -> str:
    """The message; other tests may have left helpers of Python's multiprocessing, the command leaves no process."""
    before = psutil.Process().children(recursive=True)
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert isinstance(result.exception, BDLoRAError), result.output
    assert set(psutil.Process().children(recursive=True)) <= set(before)
    return str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/model"], "--model no/such/model: found no such folder"),
        (["--preset", "slow"], "--preset: found 'slow', expected one of default, quick, paper, s-lora"),
        (["--distribution", "even"], "--distribution: found 'even', expected one of identical, uniform"),
        (["--url", "10.0.0.1:80"], "--url: found '10.0.0.1:80', expected NAME=http://HOST:PORT"),
        (["--systems", "base,sglang-csgmv"], "--systems: found 'sglang-csgmv', which needs a GPU"),
        (
            ["--url", "a=http://h:1", "--url", "a=http://h:2"],
            "--url: found the name 'a' twice, expected a name for each",
        ),
        (["--systems", "base", "--url", "base=http://h:1"], "--url: found the name 'base', which a system has"),
        (["--url", "a=http://h:1", "--rank", "4", "--rank", "8"], "--rank: found (4, 8) with --url, expected one"),
        (["--goodput", "speed:1"], "--goodput: found 'speed:1', expected ttft, tpot or e2el"),
        (["--start", "lorax"], "--start: found 'lorax', expected vllm"),
        (["--start", "vllm", "--layers", "1"], "--start vllm: found no --vllm-environment"),
        (
            ["--start", "vllm", "--layers", "1", "--vllm-environment", "/no"],
            "--vllm-environment /no: found no bin/vllm",
        ),
        (
            ["--dtype", "int8", "--hidden-size", "512", "--layers", "1"],
            "--dtype: found 'int8', expected float32, bfloat16 or float16",
        ),
        (["--trace", "no.jsonl"], "--trace no.jsonl: found No such file"),
        (["--resume"], "/report: found No such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options(arguments: list[str], message: str, tmp_path: Path) -> None:
    assert message in refusal(*arguments, "--output", tmp_path / "report", "--work", tmp_path / "work")


def test_server_that_is_down(tmp_path: Path) -> None:
    with socket.socket() as bound_and_deaf:
        bound_and_deaf.bind(("127.0.0.1", 0))
        url = f"x=http://127.0.0.1:{bound_and_deaf.getsockname()[1]}"
        found = refusal("--url", url, "--output", tmp_path / "report", "--work", tmp_path / "work")
    assert found == f"--url {url}: found no server there (ConnectionError), expected a running one"


def test_servers_that_differ_are_refused() -> None:
    """Of those that are started here; what a server at a URL does not say is not known."""
    same = {"device": "cpu", "dtype": "float32", "KV cache (tokens)": 8192, "slots": 8, "cores": "rank 0: cores 0"}
    ours = Ours(None, SYSTEMS["base"])  # type: ignore[arg-type]
    contenders: dict[str, Contender] = {"a": ours, "b": ours, "url": Given(RunningServer("url", ""), [])}

    def check(**other: object) -> None:
        SweepRunner(contenders, {}, False, 0, Silent(), {"a": same, "b": {**same, **other}, "url": {}})._check_equal(
            "b"
        )

    check()
    check(**{"KV cache (tokens)": 8200, "cores": None})
    for what, found in (("KV cache (tokens)", 9000), ("slots", 4), ("cores", "any core"), ("dtype", "bfloat16")):
        with pytest.raises(
            BDLoRAError, match=rf"{re.escape(what)}: found {found} for b and .* for a, expected the same"
        ):
            check(**{what: found})


def test_the_main_baseline_failing_is_a_failure_of_the_sweep() -> None:
    def failing(system: str) -> list[str]:
        failure = Failure(system=system, message="the server ended with exit code 1")
        return [found.system for found in main_baseline_failures(make_report("serve", failures=(failure,)))]

    # Compared with S-LoRA first, then with the base model.
    assert (failing("s_lora"), failing("base"), failing("bd_2r")) == (["s_lora"], [], [])


def test_a_resumed_sweep_starts_nothing_for_what_is_done() -> None:
    workloads = Sweep(concurrency=(1, 2)).workloads()
    batches = schedule(["a"], workloads, 2, True, 0)
    done = {turn.key for batch in batches for turn in batch}
    assert list(SweepRunner({}, {}, False, 0, Silent(), {}).run(batches, done)) == []


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert refusal("--output", file).startswith(f"--output {file}: found File exists, expected a folder")
    with largest_file(100_000):
        assert "found File too large, expected a folder that can be written" in refusal("--output", tmp_path / "report")
    (tmp_path / "report" / "report.json").touch()
    assert "found a report there, expected another folder, or --force" in refusal("--output", tmp_path / "report")


def test_adapter_that_fails_to_load(tmp_path: Path) -> None:
    model = synthetic_model(tmp_path, 512, 1, seed=0)
    system = SYSTEMS["bd-2r"]
    shape = system.adapter(4, 1)
    assert shape is not None
    config = matched_adapter(tmp_path, str(model), shape, seed=0).folder / "adapter_config.json"
    fields = json.loads(config.read_text())
    fields["use_bdlora"]["nblocks"] = 2
    config.write_text(json.dumps(fields))
    workloads = Sweep(concurrency=(1,), adapters=(2,), rank=(4,)).workloads()
    options = ServeOptions(
        str(model),
        1,
        [system],
        {},
        workloads,
        2,
        {},
        True,
        "float32",
        ("--mem-fraction-static", "0.9"),
        0,
        tmp_path,
        "",
    )
    # Which tensor contradicts which field stands in the end of the server's log.
    with pytest.raises(
        BDLoRAError, match=r"(?s)bd-2r: the server ended with exit code 1.*lora_B.weight.*expected.*2 blocks"
    ):
        run_benchmark(options, Silent())
    assert servers() == []
