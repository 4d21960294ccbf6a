"""A real ``bdlora launch`` in a process of its own, and the requests that tests send it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

START_TIMEOUT_SECONDS = 300


@dataclass
class Server:
    """One running server; ``log`` is the file with what it prints."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def post(self, path: str, **body: Any) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=120)

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, timeout=60)

    def generate(
        self, adapters: Sequence[str | None], prompts: Sequence[list[int]], new_tokens: int
    ) -> list[list[int]]:
        """Greedy tokens of one mixed batch."""
        response = self.post(
            "/generate",
            input_ids=list(prompts),
            lora_path=list(adapters),
            sampling_params={"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
        )
        assert response.status_code == 200, response.text
        return [answer["output_ids"] for answer in response.json()]

    def adapters(self) -> set[str]:
        """Names that ``/v1/models`` lists beside the base model."""
        return {model["id"] for model in self.get("/v1/models").json()["data"] if model.get("parent")}

    def scheduler_memory(self) -> list[int]:
        """Unshared bytes of each scheduler process."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [
            c.memory_full_info().uss
            for c in children
            if "scheduler" in c.name() or "scheduler" in " ".join(c.cmdline())
        ]

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def launch_command(model: Path, *flags: object) -> list[str]:
    return [sys.executable, "-m", "bdlora_cli.main", "launch", "--model", str(model), *map(str, flags)]


def start(command: Sequence[str], log: Path, cwd: Path | None = None) -> subprocess.Popen[bytes]:
    """Start in a session of its own, so that `stop` reaches every process of the server."""
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=cwd, start_new_session=True)


def stop(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(
                f"the server ended with {process.returncode}:\n{log.read_text(errors='replace')[-4000:]}"
            )
        try:
            if requests.get(url + "/health", timeout=5).status_code == 200:
                return
        except requests.RequestException:
            pass
        time.sleep(0.5)
    raise TimeoutError(f"no healthy server at {url}:\n{log.read_text(errors='replace')[-4000:]}")


@contextmanager
def running_server(model: Path, log: Path, *flags: object) -> Iterator[Server]:
    """``bdlora launch --model MODEL flags...`` on a free port."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = start(launch_command(model, "--port", port, *flags), log)
    try:
        wait_until_healthy(url, process, log)
        yield Server(url, process, log)
    finally:
        stop(process)
