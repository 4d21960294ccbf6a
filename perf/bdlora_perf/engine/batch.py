"""One batch of requests, timed where it is sent."""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import requests

from bdlora_perf.serve.servers import send
from bdlora_sglang.errors import BDLoRAError

# Special tokens come first in the vocabularies that we make; the values do not matter otherwise.
_FIRST_TOKEN = 3


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds of one prefill of a whole batch, with its first tokens, and of one decode step of that batch."""

    prefill_ms: float
    decode_ms: float


class Prompts:
    """Prompts of random tokens, none like one before."""

    def __init__(self, vocabulary: int, length: int, seed: int) -> None:
        self._tokens, self._length = range(min(_FIRST_TOKEN, vocabulary - 1), vocabulary), length
        self._rng = random.Random(seed)

    def take(self, count: int) -> list[list[int]]:
        return [self._rng.choices(self._tokens, k=self._length) for _ in range(count)]


def measure_steps(url: str, prompts: Sequence[Sequence[int]], adapters: Sequence[str], decode_steps: int) -> StepTimes:
    """Send all prompts in one message, for exactly ``1 + decode_steps`` tokens each.

    Each request has an adapter, those of ``adapters`` in turn; none asks the base model. The server streams the first
    token of each request, and then nothing until the last, so that it has nothing else to do meanwhile.

    Raises:
        BDLoRAError: the server does not answer, or as `step_times`.
    """
    new_tokens = 1 + decode_steps
    body: dict[str, object] = {
        "input_ids": prompts,
        "stream": True,
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": new_tokens,
            "ignore_eos": True,
            "stream_interval": new_tokens,
        },
    }
    if adapters:
        body["lora_path"] = list(islice(cycle(adapters), len(prompts)))
    start = time.perf_counter()
    response = send("POST", f"{url}/generate", json=body, stream=True)
    arrivals = []
    try:
        for line in response.iter_lines(chunk_size=None):  # as it comes
            seconds = time.perf_counter() - start
            if line.startswith(b"data: {"):
                chunk = json.loads(line.removeprefix(b"data: "))
                if "error" in chunk:
                    raise BDLoRAError(f"{url}: found the error {chunk['error']}, expected an answer")
                arrivals.append(Arrival(seconds, chunk.get("index", 0), chunk["meta_info"]["completion_tokens"]))
    except requests.RequestException as error:
        raise BDLoRAError(f"{url}: found no end of an answer ({type(error).__name__}), expected one") from error
    return step_times(arrivals, len(prompts), decode_steps)


@dataclass(frozen=True)
class Arrival:
    """``tokens`` of a request of the batch had arrived, ``seconds`` after it was sent."""

    seconds: float
    request: int
    tokens: int


def step_times(arrivals: Sequence[Arrival], num_requests: int, decode_steps: int) -> StepTimes:
    """The prefill ends when each request has its first token; all after that are decode steps.

    Raises:
        BDLoRAError: not each request has its first token and its last, and no more.
    """
    firsts = {arrival.request: arrival.seconds for arrival in reversed(arrivals)}
    lengths = {arrival.request: arrival.tokens for arrival in arrivals}
    if lengths != dict.fromkeys(range(num_requests), 1 + decode_steps) or len(arrivals) != 2 * num_requests:
        raise BDLoRAError(
            f"found {len(arrivals)} parts of answers of {sorted(lengths.values())} tokens, expected the first and the "
            f"last of {1 + decode_steps} tokens for each of {num_requests} requests"
        )
    prefill, whole = max(firsts.values()), arrivals[-1].seconds
    return StepTimes(1000 * prefill, 1000 * (whole - prefill) / decode_steps)
