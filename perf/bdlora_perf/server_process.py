"""A server in a process of its own: started, waited for, and stopped with everything that it started itself."""

import importlib.util
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import requests

from bdlora_sglang.errors import BDLoRAError

START_SECONDS = 600
_STOP_SECONDS = 15
_LOG_TAIL_LINES = 40

# Every process of the server is in one group, and Ctrl-C reaches us alone. But not in a session of its own: Linux gives
# each session a share of the processors ("autogroup"), and beside one that keeps them all busy a client of another has
# waited two seconds for its turn. Then its times are not the server's.
_OWN_GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}


def launch_command(*flags: object) -> list[str]:
    """``bdlora launch flags...`` with this Python."""
    return [sys.executable, "-m", "bdlora_cli.main", "launch", *map(str, flags)]


def only_models(*names: str) -> dict[str, str]:
    """The environment in which SGLang imports these of its model files alone, such as "llama".

    It imports each of its 200 in every process: half of a start on two cores.
    """
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        return {}
    kept = {"__init__", "registry", "utils", *names}
    others = {path.stem for path in (Path(spec.origin).parent / "srt" / "models").glob("*.py")} - kept
    return {"SGLANG_DISABLED_MODEL_ARCHS": ",".join(sorted(others))}


def free_port() -> int:
    """A port for a server that binds it when it is ready, seconds from now.

    Those that bind port 0 and those that connect get ports of another range meanwhile (Linux: from 32768 on).
    """
    while True:
        port = random.randrange(10_000, 30_000)
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


@contextmanager
def terminated_as_interrupted(
    handler: Callable[[int, FrameType | None], object] = signal.default_int_handler,
) -> Iterator[None]:
    """SIGTERM and SIGHUP do what Ctrl-C does, or what else ``handler`` does."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class ServerProcess:
    """A server that is under way at ``url`` and prints to the file ``log``."""

    def __init__(
        self,
        command: Sequence[str],
        url: str,
        log: Path,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        """Start ``command`` in ``folder``; without an environment it gets ours.

        Raises:
            BDLoRAError: the log cannot be written.
        """
        self.url, self.log = url, log
        try:
            file = log.open("wb")
        except OSError as error:
            raise BDLoRAError(f"{log}: found {error.strerror}, expected a file that can be written") from error
        with file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=folder,
                **_OWN_GROUP,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while the server runs."""
        return self._process.poll()

    def wait_until_healthy(self) -> None:
        """Return when the server answers; raise `BDLoRAError` with the end of its log when it never will."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise BDLoRAError(f"the server ended with exit code {self._process.returncode}.\n{self.log_tail()}")
            with suppress(requests.RequestException):
                if requests.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.5)
        raise BDLoRAError(f"the server was not ready after {START_SECONDS} s.\n{self.log_tail()}")

    def stop(self) -> None:
        """Ask the server to end, then kill whatever is left of its process group."""
        try:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def log_lines(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()

    def log_tail(self) -> str:
        return "\n".join([f"The end of {self.log}:", *self.log_lines()[-_LOG_TAIL_LINES:]])
