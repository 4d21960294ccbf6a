"""Servers to be measured: `ServerProcess` for those that are started here, `RunningServer` for those given by URL."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import requests

from bdlora_perf.checkout import Surroundings
from bdlora_perf.report.schema import Failure, Point, Value
from bdlora_perf.serve.load import Api, Target
from bdlora_perf.server_process import ServerProcess, free_port, launch_command
from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.serving.hardware import ATTENTION_BACKEND

_REQUEST_SECONDS = 600
_GIB = {"B": 2**-30, "KiB": 2**-20, "MiB": 2**-10, "GiB": 1.0}
# What `bdlora launch` prints of its memory pool, and of each rank; "TP0" is there with more than one.
_SLOTS = re.compile(r"(\d+) slots of ([\d.]+) (B|KiB|MiB|GiB) per GPU")
# The same line says last what computes LoRA.
_KERNELS = re.compile(r"BD-LoRA is in place: .*, ([^,]+)\. KV cache: ")
_RANK_CORES = re.compile(r"(?:TP(\d+)\S*)?\] This rank runs on ([^.]+)\.")


class Server(Protocol):
    """What a sweep needs of a server; `ServerProcess` is one. ``exit_code`` is None while it runs."""

    url: str

    @property
    def exit_code(self) -> int | None: ...
    def wait_until_healthy(self) -> None: ...
    def stop(self) -> None: ...
    def log_lines(self) -> list[str]: ...
    def log_tail(self) -> str: ...


S = TypeVar("S", bound=Server)
R = TypeVar("R")


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


def start_server(
    name: str, flags: Sequence[str], logs: Path, surroundings: Surroundings | None = None
) -> ServerProcess:
    """``bdlora launch flags...`` on a free port, under way; it prints to ``logs/name.log``.

    With ``surroundings`` it is that of another checkout.

    Raises:
        BDLoRAError: the log cannot be written.
    """
    port = free_port()
    return ServerProcess(
        launch_command(*flags, "--port", port),
        f"http://127.0.0.1:{port}",
        make_folder(logs) / f"{name}.log",
        {**(surroundings.environment if surroundings else os.environ), "TOKENIZERS_PARALLELISM": "false"},
        surroundings.folder if surroundings else None,
    )


@contextmanager
def servers_up(
    starts: Mapping[str, Callable[[], S]], make_ready: Callable[[str, S], R], point: Point
) -> Iterator[tuple[dict[str, R], list[Failure]]]:
    """Servers that are up together: all are under way before the first is waited for, and are stopped at the end.

    Yields:
        What ``make_ready`` makes of each that answers, and a failure at ``point`` for each that does not start, does
        not answer, or is refused there with a `BDLoRAError`.
    """
    servers: dict[str, S] = {}
    ready: dict[str, R] = {}
    failures: list[Failure] = []
    with ExitStack() as stack:
        for name, start in starts.items():
            with kept_as_failure(failures.append, name, point):
                servers[name] = start()
                stack.callback(servers[name].stop)
        for name, server in servers.items():
            with kept_as_failure(failures.append, name, point, server):
                server.wait_until_healthy()
                ready[name] = make_ready(name, server)
        yield ready, failures


@contextmanager
def kept_as_failure(
    keep: Callable[[Failure], object], system: str, point: Point, server: Server | None = None
) -> Iterator[None]:
    """A `BDLoRAError` ends the context, and ``keep`` is given what `failure_of` makes of it."""
    try:
        yield
    except BDLoRAError as error:
        keep(failure_of(system, point, error, server))


def failure_of(system: str, point: Point, error: BDLoRAError, server: Server | None = None) -> Failure:
    """The first line of an error says what happened, the others are the end of a log: the server's, if it is dead."""
    message, _, log_tail = str(error).partition("\n")
    if server is not None and server.exit_code is not None:
        message, log_tail = f"the server ended with exit code {server.exit_code}", server.log_tail()
    return Failure(system=system, point=point, message=message, log_tail=log_tail)


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


def find_target(server: Server, api: Api | None = None) -> Target:
    """How a server is asked: by SGLang's own API where it has that, else by OpenAI's.

    Raises:
        BDLoRAError: it has none of them, or does not generate as many tokens as it is told to.
    """
    models = send("GET", f"{server.url}/v1/models").json()["data"]
    model = next((model["id"] for model in models if not model.get("parent")), models[0]["id"])
    if api is None:
        api = "sglang" if requests.get(f"{server.url}/server_info", timeout=_REQUEST_SECONDS).ok else "vllm"
    if api == "sglang":
        return Target(server.url, api, model)
    body = {"model": model, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    # Some servers take text alone.
    for text, prompt in ((False, [20, 30, 40, 50]), (True, "the of and to")):
        url = f"{server.url}/v1/completions"
        response = requests.post(url, json={**body, "prompt": prompt}, timeout=_REQUEST_SECONDS)
        if response.ok:
            made = response.json().get("usage", {}).get("completion_tokens")
            if made != 4:
                raise BDLoRAError(f"{url}: found {made} tokens, expected 4: it does not heed ignore_eos")
            return Target(server.url, api, model, text)
    raise BDLoRAError(f"{url}: found status {response.status_code} ({response.text[:300]}), expected 200")


def rank_cores(log: str) -> str:
    """Cores and threads of each rank as a server's log tells them, such as ``rank 0: cores 0-3, 4 threads``."""
    found = sorted({(int(rank or 0), cores) for rank, cores in _RANK_CORES.findall(log)})
    return "; ".join(f"rank {rank}: {cores}" for rank, cores in found)


def what_runs(info: Mapping[str, Any], log: str) -> dict[str, Value]:
    """What a server of ours runs, by its own word: SGLang's resolved settings, and its log."""
    device = info["device"]
    # SGLang's settings of graphs say nothing on a CPU.
    phases = info.get("cuda_graph_config") or {} if device != "cpu" else {}
    graphs = ", ".join(f"{phase}: {found.get('backend')}" for phase, found in phases.items() if isinstance(found, dict))
    sharing = "shared memory (gloo where there is none)" if device == "cpu" else "NCCL and SGLang's custom all-reduce"
    if device != "cpu" and info["disable_custom_all_reduce"]:
        sharing = "NCCL"
    return {
        "engine": f"SGLang {info['version']}",
        "device": device,
        "dtype": info["dtype"],
        "attention": info["attention_backend"],
        "LoRA kernels": lora_kernels(info, log),
        "graphs": graphs or ("recorded decode steps" if info["attention_backend"] == ATTENTION_BACKEND else "none"),
        "collectives": sharing if info["tp_size"] > 1 else "none",
        "KV cache (tokens)": info["max_total_num_tokens"],
        "slots": info["max_loras_per_batch"] if info["enable_lora"] else None,
        "cores": rank_cores(log) or None,
    }


def lora_kernels(info: Mapping[str, Any], log: str) -> str | None:
    """SGLang's name of the backend, and what computes in ours; None without LoRA."""
    if not info["enable_lora"]:
        return None
    kernels = _KERNELS.search(log)
    return f"{info['lora_backend']}: {kernels[1]}" if kernels else str(info["lora_backend"])


def memory_metrics(info: Mapping[str, Any], log: str) -> dict[str, float]:
    """What one GPU holds, in GiB, as the server says it; the weights only where there is a GPU.

    (On a CPU SGLang takes the machine's free memory before and after, which other servers change.)
    """
    usage: Mapping[str, float] = info["internal_states"][0]["memory_usage"]
    metrics = {"memory_kv_cache_gib": float(usage["kvcache"])}
    if info["device"] != "cpu":
        metrics["memory_weights_gib"] = float(usage["weight"])
    if slots := _SLOTS.search(log):
        slot = float(slots[2]) * _GIB[slots[3]]
        metrics |= {"memory_lora_gib": int(slots[1]) * slot, "adapter_slot_mib": 1024 * slot}
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
