"""A server's place among the processes, and what is left of it in the end."""

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from bdlora_perf.server_process import ServerProcess

_WITH_A_CHILD = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Popen has no process_group")
def test_it_shares_the_processors_with_its_clients_and_ends_with_its_children(tmp_path: Path) -> None:
    server = ServerProcess([sys.executable, "-c", _WITH_A_CHILD], "http://127.0.0.1:1", tmp_path / "log")
    try:
        # Another session would be another of Linux's scheduling groups.
        assert os.getsid(server.pid) == os.getsid(0)
        assert os.getpgid(server.pid) == server.pid != os.getpgid(0)
        while not (lines := server.log_lines()):
            assert server.exit_code is None
        child = psutil.Process(int(lines[0]))
    finally:
        server.stop()
    assert server.exit_code is not None
    with suppress(psutil.NoSuchProcess):
        while child.status() != psutil.STATUS_ZOMBIE:  # where nobody asks how it ended, it stays as one
            time.sleep(0.1)
