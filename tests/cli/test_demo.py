"""The README's first command, as a new user runs it."""

import os
import subprocess
import sys
from pathlib import Path

from bdlora_perf.demo_adapters import read_reviews

# Wide enough that no answer is broken into lines.
_ENVIRONMENT = {**os.environ, "COLUMNS": "220"}


def run_demo(folder: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "bdlora_cli.main", "demo", *flags]
    return subprocess.run(command, cwd=folder, env=_ENVIRONMENT, capture_output=True, text=True)


def test_every_answer_equals_pefts_and_every_adapter_does_its_task(tmp_path: Path) -> None:
    """At TP 3, in one batch; the last adapter is converted by `lora2bd`, and comes when the server runs."""
    done = run_demo(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 of 12 answers equal PEFT's" in done.stdout
    for review in read_reviews("test")[1:3]:
        for task, answer in review.answers.items():
            assert answer in done.stdout, f"{task}: {done.stdout}"


def test_a_degree_that_does_not_divide_the_heads_is_refused_at_once(tmp_path: Path) -> None:
    done = run_demo(tmp_path, "--tp", "2")
    assert done.returncode == 1
    assert "--tp: found 2, expected 1 or 3" in done.stderr
    assert not list(tmp_path.iterdir())
