"""A server at TP 2 with more adapters than slots, and what PEFT would answer in its place."""

import threading
from pathlib import Path
from typing import Any

import requests

from bdlora_perf.synthetic.reference import PeftReference
from tests.serving.server import Server

NEW_TOKENS = 6
TP = 2
SLOTS = 4


class Served:
    """A server at TP 2 with all adapters of the zoo on four slots, and PEFT's answers."""

    def __init__(self, server: Server, model: Path, adapters: dict[str, Path]) -> None:
        self.server, self.model, self.adapters = server, model, adapters
        self._reference = PeftReference(model)
        self._expected: dict[tuple[str, tuple[int, ...], int], list[int]] = {}
        self._lock = threading.Lock()

    def expected(self, adapter: Path | None, prompt: list[int], new_tokens: int = NEW_TOKENS) -> list[int]:
        key = (str(adapter), tuple(prompt), new_tokens)
        with self._lock:
            if key not in self._expected:
                self._expected[key] = self._reference.generate(prompt, adapter, new_tokens).tokens
            return self._expected[key]

    def check(self, names: list[str | None], prompts: list[list[int]], new_tokens: int = NEW_TOKENS) -> None:
        answers = self.server.generate(names, prompts, new_tokens)
        for name, prompt, tokens in zip(names, prompts, answers, strict=True):
            assert tokens == self.expected(self.adapters.get(name or ""), prompt, new_tokens), name

    def load(self, name: str, path: Path, **options: Any) -> requests.Response:
        return self.server.post("/load_lora_adapter", lora_name=name, lora_path=str(path), **options)

    def unload(self, name: str) -> requests.Response:
        return self.server.post("/unload_lora_adapter", lora_name=name)
