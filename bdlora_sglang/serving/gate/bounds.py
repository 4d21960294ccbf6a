"""Ranges of the numbers in a request that reach SGLang's scheduler, and its kernels, unchecked."""

from dataclasses import dataclass

from bdlora_sglang.serving.gate.errors import RequestError

_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1
_FLOAT32_MAX = 3.4e38

# Each sample is a request of its own.
MAX_SAMPLES = 1024
MAX_PROMPTS = 16384
# The scheduler makes Python objects of them, for each token.
MAX_TOP_LOGPROBS = 1024


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included."""

    low: float
    high: float

    def check(self, field: str, value: object) -> None:
        """Raise `RequestError` unless ``value`` is a number in the range. NaN is in none."""
        if not isinstance(value, int | float) or not self.low <= value <= self.high:
            raise RequestError(field, value, f"a number from {self.low} to {self.high}")


# SGLang's own `SamplingParams.verify` holds others to ranges that are as narrow, or narrower.
SAMPLING = {
    "temperature": Range(0, _FLOAT32_MAX),
    "top_k": Range(-1, _INT32_MAX),
    # Logits are divided by it: smaller ones take float16 to infinity, which cannot be sampled from.
    "repetition_penalty": Range(0.01, 2),
    "max_new_tokens": Range(0, _INT32_MAX),
    "min_new_tokens": Range(0, _INT32_MAX),
    "n": Range(1, MAX_SAMPLES),
    "beam_width": Range(1, MAX_SAMPLES),
    # The scheduler takes the remainder by it.
    "stream_interval": Range(1, _INT32_MAX),
    "sampling_seed": Range(-(2**63), _INT64_MAX),
}
LOGIT_BIAS = Range(-1e9, 1e9)

# Of a tokenized request. Those that depend on the prompt or the model are in `tokenized`.
TOKENIZED = {
    "bootstrap_port": Range(0, 65535),
    "bootstrap_room": Range(0, _INT64_MAX),
    "decode_tp_size": Range(1, _INT32_MAX),
    "disagg_prefill_dp_rank": Range(0, _INT32_MAX),
    "priority": Range(-(2**63), _INT64_MAX),
    "dimensions": Range(1, _INT32_MAX),
}
