"""The user's traffic, and how many different adapters meet in one batch."""

from dataclasses import dataclass
from enum import Enum

from bdlora_sglang.errors import BDLoRAError

# SGLang's load generator: --lora-zipf-alpha; weights of `skewed` are alpha**-i.
_SKEW = 1.5


class Distribution(str, Enum):
    """How requests choose their adapter, as in SGLang's load generator: in turn, at random, or at random by weight."""

    DISTINCT = "distinct"
    UNIFORM = "uniform"
    SKEWED = "skewed"


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
        base = _SKEW if self.distribution is Distribution.SKEWED else 1.0
        weights = [base**-i for i in range(self.adapters)]
        whole = sum(weights)
        return sum(1 - (1 - weight / whole) ** requests for weight in weights)
