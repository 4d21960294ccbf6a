"""``bdlora launch`` in a process of its own, and the requests that the demo sends it."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from bdlora_perf.serve.servers import send
from bdlora_perf.server_process import ServerProcess, free_port, launch_command, only_models, terminated_as_interrupted
from bdlora_sglang.errors import BDLoRAError


@dataclass(frozen=True)
class Answer:
    """What the server generated, and in how many pieces it came."""

    tokens: list[int]
    text: str
    pieces: int = 1


class DemoServer(ServerProcess):
    """A server under way; `running_server` makes it."""

    def generate(self, requests: Sequence[tuple[str | None, list[int]]], sampling: Mapping[str, Any]) -> list[Answer]:
        """One batch, a request an adapter's name (None: the base model) with the token ids of its prompt."""
        adapters, prompts = zip(*requests, strict=True)
        body = {"input_ids": prompts, "lora_path": adapters, "sampling_params": dict(sampling)}
        answers = self._post("/generate", body).json()
        return [Answer(answer["output_ids"], answer["text"]) for answer in answers]

    def stream(self, adapter: str, prompt: list[int], sampling: Mapping[str, Any]) -> Answer:
        """One request whose answer comes piece by piece, as server-sent events."""
        body = {"input_ids": prompt, "lora_path": adapter, "sampling_params": dict(sampling), "stream": True}
        response = self._post("/generate", body, stream=True)
        events = [line.removeprefix(b"data: ") for line in response.iter_lines() if line.startswith(b"data: ")]
        if not events or events.pop() != b"[DONE]":
            raise BDLoRAError(f"{self.url}/generate: found a stream that broke off, expected [DONE] at its end")
        last = json.loads(events[-1])
        return Answer(last["output_ids"], last["text"], len(events))

    def load(self, name: str, folder: Path) -> None:
        self._post("/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    def unload(self, name: str) -> None:
        self._post("/unload_lora_adapter", {"lora_name": name})

    def _post(self, path: str, body: Mapping[str, Any], stream: bool = False) -> requests.Response:
        """Send a request; raise `BDLoRAError` with the end of the log unless the server carries it out."""
        try:
            return send("POST", f"{self.url}{path}", json=dict(body), stream=stream)
        except BDLoRAError as error:
            raise BDLoRAError(f"{error}\n{self.log_tail()}") from error

    def start_report(self) -> list[str]:
        """What ``bdlora launch`` itself says at its start, without SGLang's log lines around it."""
        lines = [line for line in self.log_lines() if not line.startswith("[")]
        tables = [i for i, line in enumerate(lines) if "Adapters at TP" in line]
        proofs = [i for i, line in enumerate(lines) if line.startswith("BD-LoRA is in place")]
        notes = [line for line in lines if line.startswith("No GPU here")]
        return notes + (lines[tables[0] : proofs[-1] + 1] if tables and proofs else [])


@contextmanager
def running_server(
    model: Path, tp: int, adapters: Path, log: Path, starting: Callable[[Sequence[str]], None]
) -> Iterator[DemoServer]:
    """``bdlora launch`` on a free port, stopped at the end whatever happens.

    Args:
        model: folder of the base model.
        tp: tensor-parallel degree.
        adapters: folder with one adapter a subfolder.
        log: file for everything that the server prints.
        starting: is told the command line before the server starts.
    """
    port = free_port()
    flags = ["--model", str(model), "--tp", str(tp), "--adapters", str(adapters)]
    flags += ["--adapter-root", str(adapters.parent)]
    flags += ["--port", str(port), "--dtype", "float32"]
    starting(["bdlora", "launch", *flags])
    with terminated_as_interrupted(lambda number, _: sys.exit(128 + number)):
        server = DemoServer(launch_command(*flags), f"http://127.0.0.1:{port}", log, _environment(tp))
        try:
            yield server
        finally:
            server.stop()


def _environment(tp: int) -> dict[str, str]:
    import torch

    environment = {
        **only_models("llama"),
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "COLUMNS": "100",
    }
    if 0 < torch.cuda.device_count() < tp:
        # Each rank needs a GPU of its own. Without any, `bdlora launch` takes the CPU.
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment
