"""The user's traffic, and the batches that it makes."""

import math
from dataclasses import dataclass
from enum import Enum

from bdlora_sglang.errors import BDLoRAError


class Distribution(str, Enum):
    """Who asks for which adapter, as in ``bdlora perf serve``: in turn, evenly, or for the i-th with weight 1 / i."""

    DISTINCT = "distinct"
    UNIFORM = "uniform"
    ZIPF = "zipf"


@dataclass(frozen=True)
class Batch:
    """One step: ``tokens`` new ones of ``sequences`` with so many ``distinct`` adapters.

    ``attended`` counts query-key pairs, ``cached`` positions that are read.
    """

    tokens: int
    sequences: int
    attended: float
    cached: float
    distinct: float


@dataclass(frozen=True)
class Traffic:
    """``concurrency`` requests are under way at any time, all of the same lengths in tokens, all with an adapter."""

    concurrency: int = 32
    input_len: int = 1024
    output_len: int = 128
    adapters: int = 8
    distribution: Distribution = Distribution.UNIFORM

    def __post_init__(self) -> None:
        for flag in ("concurrency", "input_len", "output_len", "adapters"):
            if (found := getattr(self, flag)) < 1:
                raise BDLoRAError(f"--{flag.replace('_', '-')}: found {found}, expected at least 1")

    def distinct(self, requests: int) -> float:
        """Different adapters among that many requests, on average."""
        if self.distribution is Distribution.DISTINCT:
            return min(requests, self.adapters)
        weights = [1 / (i + 1) if self.distribution is Distribution.ZIPF else 1.0 for i in range(self.adapters)]
        whole = sum(weights)
        return sum(1 - (1 - weight / whole) ** requests for weight in weights)

    def prefill(self, prompts: int) -> Batch:
        """That many whole prompts."""
        tokens = prompts * self.input_len
        return Batch(tokens, prompts, tokens * (self.input_len + 1) / 2, tokens, self.distinct(prompts))

    def decode(self) -> Batch:
        """A decode step halfway through the output."""
        requests = self.concurrency
        positions = requests * (self.input_len + math.ceil(self.output_len / 2))
        return Batch(requests, requests, positions, positions, self.distinct(requests))
