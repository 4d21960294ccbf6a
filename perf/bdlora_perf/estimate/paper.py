"""The paper's four headline speed-ups beside the estimate's for the same setting.

"Up to" is the largest over the settings of a study, so the estimate takes the largest over a grid too. What is known of
the paper's (arXiv 2510.23346: abstract and poster; a review of it on paperhub.cn) and what is assumed stands in
`KNOWN` and `ASSUMED`. No constant of the estimate was fitted to these figures.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from bdlora_perf.estimate.hardware import GPUS
from bdlora_perf.estimate.lora_cost import bd_lora, replicated, s_lora
from bdlora_perf.estimate.model_shape import SHAPES
from bdlora_perf.estimate.roofline import Deployment
from bdlora_perf.estimate.traffic import Traffic

TP = 8
NBLOCKS = 8
TOLERANCE = 0.15
CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64)
RANKS = (16, 32, 64, 128, 256)
LENGTHS = ((128, 128), (1024, 128))

KNOWN = (
    "Known of the paper's settings: eight A100, TP 8, the model, S-LoRA by vLLM's fully sharded layers, batches of up "
    "to 64 requests, mostly with one adapter; LoRA of rank r on all seven linear modules against BD-LoRA of rank 2r or "
    "4r with 8 blocks, which the published parameter ratios are."
)
ASSUMED = (
    f"Assumed: the A100 has 80 GB; r in {', '.join(map(str, RANKS))}; prompts of "
    f"{' or '.join(str(length) for length, _ in LENGTHS)} tokens and {LENGTHS[0][1]} tokens of output."
)
LACKING = (
    "What the model lacks: it lets LoRA kernels run at the speed of memory or of large matrix products. The paper's "
    "70B speed-ups fall from 1.79x to at most 1.23x when BD-LoRA's rank doubles. So, if both were measured over the "
    "same settings, BD-LoRA itself becomes at least 1.46 times slower where it gains most. By bytes and arithmetic it "
    "becomes 1% slower (r = 64, one request): its factors are 1% of what a GPU reads in a decode step. Real LoRA "
    "kernels must be far from these limits there, S-LoRA's included; by how much, abstract and poster do not say. Host "
    "overhead, waiting for the slowest rank, and padding of small ranks to the tiles of tensor cores are left out too."
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
    """A headline, the estimate's largest speed-up over the grid, and the setting that has it."""

    headline: Headline
    speed_up: float
    parameter_ratio: float
    rank: int
    traffic: Traffic

    @property
    def deviation(self) -> float:
        """How far the estimate is off: 0.1 is 10% more than the paper."""
        return self.speed_up / self.headline.speed_up - 1

    @property
    def within_tolerance(self) -> bool:
        return abs(self.deviation) <= TOLERANCE

    @property
    def setting(self) -> str:
        """Where the estimate has its largest."""
        return f"r = {self.rank}, batch {self.traffic.concurrency}, {self.traffic.input_len} tokens in"

    def describe(self) -> str:
        model = SHAPES[self.headline.model].name
        verdict = "within" if self.within_tolerance else "not within"
        return (
            f"{model} at {self.headline.parameter_ratio:.2f}x the parameters: paper {self.headline.speed_up:.2f}x, "
            f"estimate {self.speed_up:.2f}x ({self.deviation:+.0%}, {verdict} {TOLERANCE:.0%}) at {self.setting}"
        )


def compare_headlines() -> tuple[Comparison, ...]:
    """Every headline with the estimate's figure for it."""
    return tuple(max(_grid(headline), key=lambda found: found.speed_up) for headline in HEADLINES)


def _grid(headline: Headline) -> Iterator[Comparison]:
    shape = SHAPES[headline.model]
    deployment = Deployment(shape, GPUS["a100"], TP)
    for rank, concurrency, (input_len, output_len) in product(RANKS, CONCURRENCIES, LENGTHS):
        traffic = Traffic(concurrency, input_len, output_len, adapters=1)
        bd = bd_lora(headline.multiple * rank, NBLOCKS)
        speed_up = (
            deployment.requests(bd, traffic).output_throughput
            / deployment.requests(s_lora(rank), traffic).output_throughput
        )
        yield Comparison(headline, speed_up, bd.parameters(shape) / replicated(rank).parameters(shape), rank, traffic)
