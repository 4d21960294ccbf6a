"""Which rank and block count: BD-LoRA candidates against LoRA of one rank, at the user's traffic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bdlora_perf.estimate.lora_cost import ASSUMPTIONS, Serving, bd_lora, replicated, s_lora
from bdlora_perf.estimate.roofline import Deployment
from bdlora_perf.estimate.traffic import Traffic
from bdlora_sglang.errors import BDLoRAError

# BD-LoRA's rank over LoRA's, the paper's.
MULTIPLES = (2, 4)
# "For a similar number of parameters": the paper's pairs are at 0.86 and 0.87.
SAME_PARAMETERS = (0.8, 1.05)

Purpose = Literal["speed", "quality"]
REASONS: Mapping[Purpose, str] = {
    "speed": "at which the paper finds similar quality",
    "quality": "and still faster than LoRA, replicated or sharded",
}


@dataclass(frozen=True)
class Candidate:
    """BD-LoRA of one rank and block count; ``purpose`` is what it is suggested for, if it is.

    ``parameter_ratio``, ``over_s_lora`` and ``over_replicated`` are against LoRA of rank ``lora_rank``: parameters, and
    output throughput, the smallest and the largest over `ASSUMPTIONS`. ``adapter_bytes`` are one adapter's on one GPU.
    """

    serving: Serving
    lora_rank: int
    parameter_ratio: float
    over_s_lora: tuple[float, float]
    over_replicated: tuple[float, float]
    adapter_bytes: float
    fits: bool
    purpose: Purpose | None = None

    def suggestion(self) -> str:
        """In one sentence, what it is suggested for and why."""
        assert self.purpose is not None, self
        return (
            f"Suggested for {self.purpose} in place of LoRA r = {self.lora_rank}: {self.serving.label}, rank "
            f"{self.serving.rank} ({self.parameter_ratio:.2f}x LoRA's parameters, {REASONS[self.purpose]})."
        )


def candidates(deployment: Deployment, traffic: Traffic, rank: int, blocks: Sequence[int]) -> tuple[Candidate, ...]:
    """All candidates against LoRA of ``rank``, the suggested ones with a purpose.

    Raises:
        BDLoRAError: a block count is below 1, none divides a candidate's rank, or one neither divides the TP degree
            nor is divided by it.
    """
    if min(blocks) < 1:
        raise BDLoRAError(f"--blocks: found {min(blocks)}, expected at least 1")
    ranks = [multiple * rank for multiple in MULTIPLES]
    pairs = [(own, nblocks) for own in ranks for nblocks in blocks if own % nblocks == 0]
    if not pairs:
        raise BDLoRAError(
            f"--blocks: found {', '.join(map(str, blocks))} at LoRA rank {rank}, expected a divisor of "
            f"{' or '.join(map(str, ranks))}"
        )
    return _with_purposes([_candidate(deployment, traffic, rank, *pair) for pair in pairs])


def _candidate(deployment: Deployment, traffic: Traffic, lora_rank: int, rank: int, nblocks: int) -> Candidate:
    multiple = f"{rank // lora_rank}r"
    label = f"BD-LoRA {multiple}, {nblocks} block{'s' if nblocks > 1 else ''}"
    serving = bd_lora(rank, nblocks, f"bd-{multiple}-{nblocks}b", label)

    def over(other: Serving) -> tuple[float, float]:
        known = [replace(deployment, assumptions=assumptions) for assumptions in ASSUMPTIONS]
        ratios = [each.speed_up(serving, other, traffic) for each in known]
        return min(ratios), max(ratios)

    return Candidate(
        serving,
        lora_rank,
        serving.parameters(deployment.shape) / replicated(lora_rank).parameters(deployment.shape),
        over(s_lora(lora_rank)),
        over(replicated(lora_rank)),
        serving.adapter_bytes(deployment.shape, deployment.tp),
        deployment.fits(serving, traffic),
    )


def _with_purposes(found: Sequence[Candidate]) -> tuple[Candidate, ...]:
    low, high = SAME_PARAMETERS
    same = [c for c in found if c.fits and low <= c.parameter_ratio <= high]
    # By the largest speed-ups: where a slow host hides all differences, none is left in the smallest. A tenth of a
    # percent is no difference: then the larger adapter.
    fastest = max(same, key=lambda c: (round(c.over_s_lora[1], 3), c.parameter_ratio), default=None)
    gaining = [c for c in found if c.fits and all(low >= 1 < high for low, high in (c.over_s_lora, c.over_replicated))]
    largest = max(gaining, key=lambda c: (c.parameter_ratio, c.over_s_lora[1]), default=None)
    # The smaller purpose goes last: where one candidate serves both, it is suggested for speed.
    purposes: dict[Candidate | None, Purpose] = {largest: "quality", fastest: "speed"}
    return tuple(replace(c, purpose=purposes.get(c)) for c in found)
