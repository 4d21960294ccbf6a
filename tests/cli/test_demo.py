"""The README's first command, as a new user runs it."""

import subprocess
import sys
from pathlib import Path


def test_every_answer_equals_pefts(tmp_path: Path) -> None:
    """The last adapter comes when the server runs, with more blocks than any before it."""
    command = [sys.executable, "-m", "bdlora_cli.main", "demo"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 of 7 answers equal PEFT's" in done.stdout
