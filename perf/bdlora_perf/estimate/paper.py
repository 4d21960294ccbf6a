"""The paper's headlines, and which assumption each of them needs.

arXiv 2510.23346: eight A100, TP 8, against S-LoRA; the parameter ratios are those of BD-LoRA with 2r or 4r and 8 blocks
against LoRA of rank r.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product

from scipy.optimize import brentq

from bdlora_perf.estimate.hardware import GPUS, NCCL
from bdlora_perf.estimate.lora_cost import ASSUMPTIONS, Assumptions, bd_lora, replicated, s_lora
from bdlora_perf.estimate.model_shape import SHAPES
from bdlora_perf.estimate.roofline import Deployment
from bdlora_perf.estimate.traffic import Traffic

TP = NBLOCKS = 8
CONCURRENCIES = (1, 8, 64)
RANKS = (16, 64, 256)
LENGTHS = ((128, 128), (1024, 128))
# No collective of so few bytes takes longer on these machines.
_MOST_LATENCY = 1e-3
# No host takes as long for a step.
_MOST_HOST = 1.0

CAVEATS = (
    "Known of the paper's settings: eight A100, TP 8, the model, S-LoRA by vLLM's fully sharded layers, batches of up "
    "to 64 requests, mostly with one adapter; LoRA of rank r on all seven linear modules against BD-LoRA of rank 2r or "
    "4r with 8 blocks, which the published parameter ratios are. Its authors later name 10 to 40% on 8B (vLLM, pull "
    "request 28136).",
    f"Assumed: the A100 has 80 GB; r in {', '.join(map(str, RANKS))}; prompts of "
    f"{' or '.join(str(length) for length, _ in LENGTHS)} tokens and {LENGTHS[0][1]} tokens of output.",
    "Not in the model: waiting for the slowest rank, padding of small ranks to tiles. So no figure here confirms or "
    "refutes a headline: it says what would have to hold.",
)


@dataclass(frozen=True)
class Headline:
    """A published speed-up over S-LoRA; BD-LoRA has ``multiple`` times its rank."""

    model: str
    multiple: int
    parameter_ratio: float
    speed_up: float


HEADLINES = (
    Headline("llama-3.1-70b", 2, 0.87, 1.79),
    Headline("llama-3.1-70b", 4, 1.74, 1.23),
    Headline("llama-3.1-8b", 2, 0.86, 1.63),
    Headline("llama-3.1-8b", 4, 1.73, 1.30),
)


@dataclass(frozen=True)
class Comparison:
    """A headline, the estimate's largest speed-up over the grid by assumptions, and the latency that it would take.

    ``needed_latency``: seconds of each of LoRA's collectives at which the estimate, with kernels at the speed of memory
    or arithmetic, has its largest speed-up where the paper has it; None where no latency does. ``most_host``: the same
    for the host's seconds a step, with measured latencies; None where the estimate has less without any.
    """

    headline: Headline
    parameter_ratio: float
    speed_ups: dict[str, float]
    needed_latency: float | None
    most_host: float | None

    def describe(self) -> str:
        """All of it in one sentence."""
        found = self.speed_ups.values()
        gather, reduce = (NCCL[kind][0].value for kind in ("all-gather", "all-reduce"))
        needed = "no latency of the collectives alone gives it"
        if self.needed_latency is not None:
            needed = f"it needs {self.needed_latency * 1e6:.0f} us for each of LoRA's collectives"
        host = "" if self.most_host is None else f"; a host of {self.most_host * 1e3:.1f} ms a step gives it, too"
        return (
            f"{SHAPES[self.headline.model].name} at {self.headline.parameter_ratio:.2f}x the parameters: paper up to "
            f"{self.headline.speed_up:.2f}x, estimate up to {min(found):.2f}x to {max(found):.2f}x, by assumption; "
            f"with kernels that cost nothing more {needed}, where {gather:g} to {reduce:g} are measured{host}."
        )


@cache
def compare_headlines() -> tuple[Comparison, ...]:
    """Every headline with the estimate's figures for it."""
    return tuple(map(_compare, HEADLINES))


def _compare(headline: Headline) -> Comparison:
    def over(assumptions: Assumptions) -> float:
        return _largest(headline, assumptions) - headline.speed_up

    shape, multiple = SHAPES[headline.model], headline.multiple
    return Comparison(
        headline,
        bd_lora(multiple * NBLOCKS, NBLOCKS).parameters(shape) / replicated(NBLOCKS).parameters(shape),
        {known.name: _largest(headline, known) for known in ASSUMPTIONS},
        needed_latency=_root(lambda latency: over(Assumptions("", latency=latency)), _MOST_LATENCY),
        most_host=_root(lambda host: -over(Assumptions("", host=host)), _MOST_HOST),
    )


def _largest(headline: Headline, assumptions: Assumptions) -> float:
    """The estimate's speed-up where it is largest."""
    deployment = Deployment(SHAPES[headline.model], GPUS["a100"], TP, assumptions)
    return max(
        deployment.speed_up(
            bd_lora(headline.multiple * rank, NBLOCKS), s_lora(rank), Traffic(concurrency, *lengths, adapters=1)
        )
        for rank, concurrency, lengths in product(RANKS, CONCURRENCIES, LENGTHS)
    )


def _root(rising: Callable[[float], float], most: float) -> float | None:
    """Where ``rising`` is zero between 0 and ``most``; None where it is not."""
    return float(brentq(rising, 0, most, xtol=1e-7)) if rising(0) < 0 < rising(most) else None
