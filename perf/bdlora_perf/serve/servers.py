"""Servers to be measured: `ServerProcess` for those that are started here, `RunningServer` for those given by URL."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import requests

from bdlora_perf.server_process import ServerProcess, free_port, launch_command
from bdlora_sglang.errors import BDLoRAError

_REQUEST_SECONDS = 600
_GIB = {"B": 2**-30, "KiB": 2**-20, "MiB": 2**-10, "GiB": 1.0}
# What `bdlora launch` prints of its memory pool.
_SLOTS = re.compile(r"(\d+) slots of ([\d.]+) (B|KiB|MiB|GiB) per GPU")


class Server(Protocol):
    """What a sweep needs of a server; `ServerProcess` is one. ``exit_code`` is None while it runs."""

    url: str

    @property
    def exit_code(self) -> int | None: ...
    def wait_until_healthy(self) -> None: ...
    def stop(self) -> None: ...
    def log_lines(self) -> list[str]: ...
    def log_tail(self) -> str: ...


# How a system's server is started for a number of adapters and a rank.
StartServer = Callable[[int, int], Server]


class RunningServer:
    """A server that somebody else started, and that goes on when we are done."""

    exit_code = None

    def __init__(self, name: str, url: str) -> None:
        self._name, self.url = name, url.rstrip("/")

    def wait_until_healthy(self) -> None:
        try:
            status = requests.get(f"{self.url}/health", timeout=10).status_code
        except requests.RequestException as error:
            raise BDLoRAError(
                f"--url {self._name}={self.url}: found no server there ({type(error).__name__}), expected a running one"
            ) from error
        if status != 200:
            raise BDLoRAError(f"--url {self._name}={self.url}: found status {status} at /health, expected 200")

    def stop(self) -> None:
        """Leave it alone."""

    def log_lines(self) -> list[str]:
        return []

    def log_tail(self) -> str:
        return ""


def start_server(name: str, flags: Sequence[str], logs: Path) -> ServerProcess:
    """``bdlora launch flags...`` on a free port, under way; it prints to ``logs/name.log``.

    Raises:
        BDLoRAError: the log cannot be written.
    """
    port = free_port()
    return ServerProcess(
        launch_command(*flags, "--port", port),
        f"http://127.0.0.1:{port}",
        make_folder(logs) / f"{name}.log",
        {**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )


def make_folder(folder: Path) -> Path:
    """The folder, which now exists; raises `BDLoRAError` where it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BDLoRAError(f"{folder}: found {error.strerror}, expected a folder that can be written") from error
    return folder


def adapter_names(server: Server) -> list[str]:
    """The adapters that ``/v1/models`` lists beside the base model, sorted."""
    models = send("GET", f"{server.url}/v1/models").json()["data"]
    return sorted(model["id"] for model in models if model.get("parent"))


def warm_up(server: Server, names: Sequence[str]) -> None:
    """One batch with a short request for each adapter, so that each takes its slot; without adapters one request."""
    adapters = {"lora_path": list(names)} if names else {}
    body = {
        "input_ids": [[2, 3, 4, 5]] * max(1, len(names)),
        "sampling_params": {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True},
    }
    send("POST", f"{server.url}/generate", json=body | adapters)


def memory_metrics(server: Server) -> dict[str, float]:
    """What one GPU holds, in GiB, as the server says it: nothing without a log, the weights only where there is a GPU.

    (On a CPU SGLang takes the machine's free memory before and after, which other servers change.)
    """
    log_lines = server.log_lines()
    if not log_lines:
        return {}
    info = send("GET", f"{server.url}/server_info").json()
    usage: Mapping[str, float] = info["internal_states"][0]["memory_usage"]
    metrics = {"memory_kv_cache_gib": float(usage["kvcache"])}
    if info["device"] != "cpu":
        metrics["memory_weights_gib"] = float(usage["weight"])
    slots = _SLOTS.search("\n".join(log_lines))
    if slots is not None:
        metrics["memory_lora_gib"] = int(slots[1]) * float(slots[2]) * _GIB[slots[3]]
    return metrics


def send(method: str, url: str, **options: object) -> requests.Response:
    """Ask a server; raises `BDLoRAError` for anything but an answer with status 200."""
    try:
        response = requests.request(method, url, timeout=_REQUEST_SECONDS, **options)
    except requests.RequestException as error:
        raise BDLoRAError(f"{url}: found no answer ({type(error).__name__}), expected one") from error
    if response.status_code != 200:
        raise BDLoRAError(f"{url}: found status {response.status_code} ({response.text[:300]}), expected 200")
    return response
