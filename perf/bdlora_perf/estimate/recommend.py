"""Which rank and block count: BD-LoRA candidates against LoRA of one rank, at the user's traffic."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from bdlora_perf.estimate.lora_cost import ASSUMPTIONS, Serving, adapter_bytes, bd_lora, replicated, s_lora
from bdlora_perf.estimate.roofline import Deployment
from bdlora_perf.estimate.traffic import Traffic
from bdlora_sglang.errors import BDLoRAError

# BD-LoRA's rank over LoRA's, the paper's.
MULTIPLES = (2, 4)
# "For a similar number of parameters": the paper's pairs are at 0.86 and 0.87.
SAME_PARAMETERS = (0.8, 1.05)


class Purpose(Enum):
    SPEED = "speed"
    QUALITY = "quality"


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

    @property
    def reason(self) -> str:
        """Why it is suggested."""
        if self.purpose is Purpose.SPEED:
            return f"{self.parameter_ratio:.2f}x LoRA's parameters, at which the paper finds similar quality"
        if self.purpose is Purpose.QUALITY:
            return f"{self.parameter_ratio:.2f}x LoRA's parameters, and still faster than LoRA, replicated or sharded"
        return ""


def default_blocks(tp: int) -> tuple[int, ...]:
    """Half as many blocks as ranks, as many, and twice as many."""
    return tuple(sorted({max(1, tp // 2), tp, 2 * tp}))


def candidates(deployment: Deployment, traffic: Traffic, rank: int, blocks: Sequence[int]) -> tuple[Candidate, ...]:
    """All candidates against LoRA of ``rank``, the suggested ones with a purpose.

    Raises:
        BDLoRAError: a block count is below 1, none divides a candidate's rank, or one neither divides the TP degree
            nor is divided by it.
    """
    if min(blocks) < 1:
        raise BDLoRAError(f"--blocks: found {min(blocks)}, expected at least 1")
    found = tuple(_candidates(deployment, traffic, rank, blocks))
    if not found:
        raise BDLoRAError(
            f"--blocks: found {', '.join(map(str, blocks))} at LoRA rank {rank}, expected a divisor of "
            f"{' or '.join(str(multiple * rank) for multiple in MULTIPLES)}"
        )
    return _with_purposes(found)


def _candidates(deployment: Deployment, traffic: Traffic, rank: int, blocks: Sequence[int]) -> Iterator[Candidate]:
    shape, tp = deployment.shape, deployment.tp
    for multiple in MULTIPLES:
        for nblocks in blocks:
            if multiple * rank % nblocks:
                continue
            label = f"BD-LoRA {multiple}r, {nblocks} block{'s' if nblocks > 1 else ''}"
            serving = bd_lora(multiple * rank, nblocks, f"bd-{multiple}r-{nblocks}b", label)
            yield Candidate(
                serving,
                rank,
                serving.parameters(shape) / replicated(rank).parameters(shape),
                _over(deployment, traffic, serving, s_lora(rank)),
                _over(deployment, traffic, serving, replicated(rank)),
                adapter_bytes(shape, serving, tp),
                deployment.fits(serving, traffic),
            )


def _over(deployment: Deployment, traffic: Traffic, serving: Serving, other: Serving) -> tuple[float, float]:
    """How many times the other's output throughput, at least and at most."""
    ratios = [
        known.requests(serving, traffic).output_throughput / known.requests(other, traffic).output_throughput
        for known in (replace(deployment, assumptions=assumptions) for assumptions in ASSUMPTIONS)
    ]
    return min(ratios), max(ratios)


def _with_purposes(found: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    low, high = SAME_PARAMETERS
    same = [c for c in found if c.fits and low <= c.parameter_ratio <= high]
    # By the largest speed-ups: where a slow host hides all differences, none is left in the smallest. A tenth of a
    # percent is no difference: then the larger adapter.
    fastest = max(same, key=lambda c: (round(c.over_s_lora[1], 3), c.parameter_ratio), default=None)
    gaining = [c for c in found if c.fits and all(low >= 1 < high for low, high in (c.over_s_lora, c.over_replicated))]
    largest = max(gaining, key=lambda c: (c.parameter_ratio, c.over_s_lora[1]), default=None)
    # The smaller purpose goes last: where one candidate serves both, it is suggested for speed.
    purposes = {largest: Purpose.QUALITY, fastest: Purpose.SPEED}
    return tuple(replace(c, purpose=purposes.get(c)) for c in found)
