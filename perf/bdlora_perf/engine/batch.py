"""One batch of requests, timed where it is sent."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

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


def batch_seconds(url: str, prompts: Sequence[Sequence[int]], adapters: Sequence[str], new_tokens: int) -> float:
    """Seconds from sending all prompts in one message to the last answer, each of exactly ``new_tokens`` tokens.

    Each request has an adapter, those of ``adapters`` in turn; none asks the base model.

    Raises:
        BDLoRAError: the server does not answer, or an answer has another length.
    """
    body: dict[str, object] = {
        "input_ids": prompts,
        "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
    }
    if adapters:
        body["lora_path"] = list(islice(cycle(adapters), len(prompts)))
    start = time.perf_counter()
    response = send("POST", f"{url}/generate", json=body)
    seconds = time.perf_counter() - start
    lengths = [answer["meta_info"]["completion_tokens"] for answer in response.json()]
    if lengths != [new_tokens] * len(prompts):
        raise BDLoRAError(f"{url}: found answers of {lengths} tokens, expected {len(prompts)} of {new_tokens}")
    return seconds


def step_times(first_seconds: float, whole_seconds: float, decode_steps: int) -> StepTimes:
    """From the time of a batch with one new token, and with ``decode_steps`` more.

    Raises:
        BDLoRAError: the longer answer did not take longer.
    """
    if whole_seconds <= first_seconds:
        raise BDLoRAError(
            f"found {whole_seconds:.3f} s with {decode_steps} decode steps and {first_seconds:.3f} s without, expected "
            "more: use a quieter machine, or more --decode-steps"
        )
    return StepTimes(1000 * first_seconds, 1000 * (whole_seconds - first_seconds) / decode_steps)


def measure_steps(url: str, prompts: Prompts, count: int, adapters: Sequence[str], decode_steps: int) -> StepTimes:
    """Two batches of ``count`` fresh prompts, one that ends after its first token, one that goes on.

    Raises:
        BDLoRAError: as `batch_seconds` and `step_times`.
    """
    first = batch_seconds(url, prompts.take(count), adapters, 1)
    whole = batch_seconds(url, prompts.take(count), adapters, 1 + decode_steps)
    return step_times(first, whole, decode_steps)
