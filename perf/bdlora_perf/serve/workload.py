"""What is asked of the servers: the points of a sweep, and the named sweeps."""

import math
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

from bdlora_perf.report.schema import Value
from bdlora_sglang.errors import BDLoRAError

Distribution = Literal["identical", "uniform", "skewed", "distinct"]
DISTRIBUTIONS: tuple[Distribution, ...] = get_args(Distribution)

# Where the number of prompts is not given: so many for each request in flight, or so many seconds of arrivals.
_WAVES = 4
_SECONDS = 60
_FEWEST_PROMPTS = 16

# SGLang's "skewed": adapter i gets ALPHA times the requests of adapter i + 1. Its default.
SKEW_ALPHA = 1.5


@dataclass(frozen=True)
class Workload:
    """One point of a sweep. Lengths are in tokens.

    Attributes:
        concurrency: requests in flight; None where ``request_rate`` is given.
        request_rate: mean arrivals a second, a Poisson process.
        input_len, output_len: longest prompt and longest answer.
        shortest: lengths are uniform between this part of the longest and the longest; 1 fixes them.
        adapters: how many the server holds.
        distribution: which adapter a request asks for. identical: all the same one; uniform: drawn evenly; skewed: see
            `SKEW_ALPHA`; distinct: each in turn, so that no two requests in flight share one.
        rank: r of plain LoRA; the other systems' adapters are matched to it.
        num_prompts: requests of one run.
    """

    concurrency: int | None
    request_rate: float | None
    input_len: int
    output_len: int
    shortest: float
    adapters: int
    distribution: Distribution
    rank: int
    num_prompts: int

    @property
    def deployment(self) -> tuple[int, int]:
        """What a server must be started anew for: the number of adapters and their rank."""
        return self.adapters, self.rank

    def point(self, tp: int) -> dict[str, Value]:
        """The coordinates of its samples in the report."""
        load = {"concurrency": self.concurrency, "request_rate": self.request_rate}
        return {
            **{name: value for name, value in load.items() if value is not None},
            "input_len": self.input_len,
            "output_len": self.output_len,
            "adapters": self.adapters,
            "distribution": self.distribution,
            "rank": self.rank,
            "tp": tp,
        }


@dataclass(frozen=True)
class Sweep:
    """Every combination of its values; either ``concurrency`` or ``request_rate`` is empty."""

    concurrency: tuple[int, ...] = (1, 8, 32)
    request_rate: tuple[float, ...] = ()
    input_len: tuple[int, ...] = (512,)
    output_len: tuple[int, ...] = (128,)
    shortest: float = 1.0
    adapters: tuple[int, ...] = (8,)
    distribution: tuple[Distribution, ...] = ("uniform",)
    rank: tuple[int, ...] = (16,)
    num_prompts: int | None = None

    def workloads(self) -> list[Workload]:
        """The points, those of one deployment side by side.

        Raises:
            BDLoRAError: both kinds of load, none, or a distribution that the adapters do not allow.
        """
        if bool(self.concurrency) == bool(self.request_rate):
            raise BDLoRAError(
                f"--concurrency, --request-rate: found {self.concurrency} and {self.request_rate}, expected one of them"
            )
        loads: list[tuple[int | None, float | None]] = [(c, None) for c in self.concurrency]
        loads += [(None, rate) for rate in self.request_rate]
        workloads = []
        for adapters, rank, (concurrency, rate), input_len, output_len, distribution in product(
            self.adapters, self.rank, loads, self.input_len, self.output_len, self.distribution
        ):
            _check_distribution(distribution, adapters, concurrency)
            workloads.append(
                Workload(
                    concurrency,
                    rate,
                    input_len,
                    output_len,
                    self.shortest,
                    adapters,
                    distribution,
                    rank,
                    self.num_prompts or _default_prompts(concurrency, rate),
                )
            )
        return workloads


def _check_distribution(distribution: Distribution, adapters: int, concurrency: int | None) -> None:
    if distribution in ("skewed", "distinct") and adapters < 2:
        raise BDLoRAError(f"--adapters {adapters}: found {distribution} requests, expected two adapters at least")
    if distribution == "distinct" and concurrency is not None and adapters < concurrency:
        raise BDLoRAError(
            f"--adapters {adapters}: found distinct requests with {concurrency} in flight, expected an adapter for each"
        )


def _default_prompts(concurrency: int | None, request_rate: float | None) -> int:
    prompts = concurrency * _WAVES if concurrency is not None else math.ceil((request_rate or 0) * _SECONDS)
    return max(prompts, _FEWEST_PROMPTS)


@dataclass(frozen=True)
class Preset:
    """A named sweep. ``goodput``: bounds as SGLang's ``--goodput`` takes them, in milliseconds."""

    description: str
    sweep: Sweep
    systems: tuple[str, ...] = ()
    model: str = "synthetic"
    tp: int = 1
    rounds: int = 5
    # The bounds of MLPerf Inference's server scenario for a 70B chat model.
    goodput: tuple[str, ...] = ("ttft:2000", "tpot:200")


PRESETS: dict[str, Preset] = {
    "default": Preset(
        "A small sweep over the number of requests in flight.",
        Sweep(),
    ),
    "quick": Preset(
        "Three minutes on two cores: shows that all works, not which system is faster.",
        Sweep(concurrency=(4,), input_len=(32,), output_len=(8,), adapters=(4,), rank=(8,), num_prompts=8),
        systems=("base", "bd-2r", "lora-fully-sharded"),
        tp=2,
        rounds=3,
    ),
    # Known of arXiv 2510.23346: Llama-3.1-8B and -70B (--model llama-3.1-70b), TP 8 on eight A100, all seven linear
    # modules, S-LoRA's sharding as the baseline, adapters of 0.86x to 0.87x and 1.73x to 1.74x its parameters. That is
    # BD rank 2r and 4r at TP 8. Assumed: ranks, batch sizes, lengths, and that each request has an adapter of its own.
    "paper": Preset(
        "The BD-LoRA paper: Llama-3.1 at TP 8 with matched adapters; batch sizes, lengths and ranks are assumed.",
        Sweep(
            concurrency=(1, 16, 64),
            input_len=(1024,),
            output_len=(128,),
            adapters=(64,),
            distribution=("distinct",),
            rank=(16, 64),
        ),
        systems=("base", "bd-2r", "bd-4r", "lora", "lora-fully-sharded"),
        model="llama-3.1-8b",
        tp=8,
    ),
    # S-LoRA (arXiv 2311.03285), section 7: lengths uniform in [8, 512] each, rank 8 in setting S1, goodput as first
    # token within 6 s, arrivals from a gamma process. At its usual coefficient of variation, 1, that is the Poisson
    # process used here. What differs: S-LoRA draws adapters by a power law, adapter i with weight i^-alpha, SGLang
    # geometrically (`SKEW_ALPHA`); S-LoRA serves up to 2000 adapters from host memory, here each has a slot on the GPU.
    "s-lora": Preset(
        "S-LoRA's synthetic workload: Poisson arrivals, skewed adapters, lengths from 8 to 512.",
        Sweep(
            concurrency=(),
            request_rate=(1.0, 2.0, 4.0),
            input_len=(512,),
            output_len=(512,),
            shortest=8 / 512,
            adapters=(32,),
            distribution=("skewed",),
            rank=(8,),
        ),
        goodput=("ttft:6000",),
    ),
}
