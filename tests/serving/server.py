"""A real ``bdlora launch`` in a process of its own, and the requests that tests send it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import requests

from bdlora_perf.server_process import ServerProcess, free_port, launch_command


class Server(ServerProcess):
    """A running server, and the requests that tests send it."""

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
        children = psutil.Process(self.pid).children(recursive=True)
        return [
            c.memory_full_info().uss
            for c in children
            if "scheduler" in c.name() or "scheduler" in " ".join(c.cmdline())
        ]


@contextmanager
def running_server(model: Path, log: Path, *flags: object, server_class: type[Server] = Server) -> Iterator[Server]:
    """``bdlora launch --model MODEL flags...`` on a free port."""
    port = free_port()
    server = server_class(launch_command("--model", model, "--port", port, *flags), f"http://127.0.0.1:{port}", log)
    try:
        server.wait_until_healthy()
        yield server
    finally:
        server.stop()
