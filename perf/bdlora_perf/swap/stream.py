"""A request whose tokens arrive one by one, and how long it went without one."""

import threading
import time
from collections.abc import Sequence
from itertools import pairwise

from bdlora_perf.serve.servers import send
from bdlora_sglang.errors import BDLoRAError

_FIRST_SECONDS = 60


class TokenStream:
    """A running request for the base model; times are of `time.perf_counter`."""

    def __init__(self, url: str, prompt: Sequence[int], most_tokens: int) -> None:
        """Send it, and return when its first tokens have arrived; raises `BDLoRAError` when they do not."""
        sampling = {"temperature": 0, "max_new_tokens": most_tokens, "ignore_eos": True}
        body = {"input_ids": list(prompt), "sampling_params": sampling, "stream": True}
        self.times: list[float] = []
        self._started, self._stopped = threading.Event(), threading.Event()
        self._response = send("POST", f"{url}/generate", json=body, stream=True)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        if not self._started.wait(_FIRST_SECONDS):
            raise BDLoRAError(f"{url}: found no stream of tokens, expected one")

    def _read(self) -> None:
        for line in self._response.iter_lines(chunk_size=1):
            if line.startswith(b"data:"):
                self.times.append(time.perf_counter())
                if len(self.times) >= 4:
                    self._started.set()
            if self._stopped.is_set():
                break

    def stop(self) -> None:
        """End the request; the server sees that nobody listens."""
        self._stopped.set()
        self._thread.join(_FIRST_SECONDS)
        self._response.close()


def longest_gap_ms(times: Sequence[float], start: float, stop: float) -> float:
    """Milliseconds between two tokens, of which the first came before ``stop`` and the second after ``start``.

    Raises:
        BDLoRAError: there are no two such tokens.
    """
    gaps = [second - first for first, second in pairwise(times) if first < stop and second > start]
    if not gaps:
        raise BDLoRAError("found no two tokens beside the loads, expected a stream that goes on: give a longer one")
    return 1000 * max(gaps)
