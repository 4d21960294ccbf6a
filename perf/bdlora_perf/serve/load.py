"""One run of SGLang's own load generator, ``sglang.benchmark.serving``, in a process of its own."""

import importlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from bdlora_perf.serve.workload import SKEW_ALPHA, Workload
from bdlora_sglang.errors import BDLoRAError

_GENERATOR = "sglang.benchmark.serving"
_POLL_SECONDS = 0.5
_LOG_TAIL_LINES = 20
# More wait for the whole sweep than tell anything.
_MOST_WARMUPS = 32


def generator_arguments(
    url: str, workload: Workload, adapters: Sequence[str], tokenizer: str | None, goodput: Sequence[str], seed: int
) -> list[str]:
    """The command line of ``sglang.benchmark.serving`` for one run.

    Prompts go as tokens, so that their lengths are exact. Two runs with one seed send the same prompts in the same
    order. ``adapters`` are the names that the server has; none measures the base model.
    """
    arguments = ["--backend", "sglang", "--base-url", url, "--dataset-name", "random-ids", "--tokenize-prompt"]
    arguments += ["--random-input-len", str(workload.input_len), "--random-output-len", str(workload.output_len)]
    arguments += ["--random-range-ratio", str(workload.shortest), "--num-prompts", str(workload.num_prompts)]
    if workload.concurrency is not None:
        arguments += ["--max-concurrency", str(workload.concurrency)]
    if workload.request_rate is not None:
        arguments += ["--request-rate", str(workload.request_rate)]
    if tokenizer is not None:
        arguments += ["--model", tokenizer, "--tokenizer", tokenizer]
    if adapters:
        arguments += ["--lora-name", *_requested(workload, adapters)]
        if workload.distribution != "identical":
            arguments += ["--lora-request-distribution", workload.distribution]
        if workload.distribution == "skewed":
            arguments += ["--lora-zipf-alpha", str(SKEW_ALPHA)]
    if goodput:
        arguments += ["--goodput", *goodput]
    warmups = min(workload.concurrency or 1, _MOST_WARMUPS)
    arguments += ["--warmup-requests", str(warmups), "--flush-cache", "--seed", str(seed)]
    return [*arguments, "--disable-tqdm", "--output-details"]


def _requested(workload: Workload, adapters: Sequence[str]) -> Sequence[str]:
    if len(adapters) < workload.adapters:
        raise BDLoRAError(f"--adapters {workload.adapters}: found {len(adapters)} on the server, expected as many")
    return adapters[:1] if workload.distribution == "identical" else adapters[: workload.adapters]


class LoadGenerator:
    """SGLang's load generator, imported once (which takes as long as a short run) and forked for each run."""

    def __init__(self, folder: Path) -> None:
        """``folder`` takes the generator's log and result, of the last run each."""
        self._log, self._result = folder / "generator.log", folder / "generator.jsonl"
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["bdlora_perf.serve.preload"])

    def prepare(self) -> None:
        """Start importing the generator, in the background."""
        # Starting a process would wait for the import.
        forkserver.ensure_running()

    def run(self, arguments: Sequence[str], server_runs: Callable[[], bool]) -> dict[str, Any]:
        """One run; returns the generator's result.

        Raises:
            BDLoRAError: the server ended (``server_runs`` is asked all the time), the generator failed, or requests
                did. The first line says what, the others are the end of the generator's log.
        """
        self._result.unlink(missing_ok=True)
        command = [*arguments, "--output-file", str(self._result)]
        process = self._context.Process(target=_generate, args=(command, str(self._log)), daemon=True)
        process.start()
        try:
            while process.is_alive() and server_runs():
                process.join(_POLL_SECONDS)
        finally:
            process.kill()
            process.join()
        if not server_runs():
            raise BDLoRAError(f"the server ended during the run\n{self._log_tail()}")
        if process.exitcode != 0 or not self._result.is_file():
            raise BDLoRAError(f"{_GENERATOR} ended with exit code {process.exitcode}, expected 0\n{self._log_tail()}")
        return _checked(json.loads(self._result.read_text(encoding="utf-8").splitlines()[-1]))

    def _log_tail(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines() if self._log.is_file() else []
        return "\n".join([f"The end of {self._log}:", *lines[-_LOG_TAIL_LINES:]])


def _checked(result: dict[str, Any]) -> dict[str, Any]:
    """A run with failed requests is no faster run."""
    errors = [error for error in result["errors"] if error]
    failed = len(result["errors"]) - result["completed"]
    if failed:
        reason = errors[0].strip().splitlines()[-1] if errors else "no reason given"
        raise BDLoRAError(f"found {failed} of {len(result['errors'])} requests failed, expected none: {reason[:300]}")
    return result


def _generate(arguments: Sequence[str], log: str) -> None:
    """In the forked process: the generator's own command line, everything it prints in ``log``."""
    with Path(log).open("wb") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = [_GENERATOR, *arguments]
    importlib.import_module(_GENERATOR).cli_main()
