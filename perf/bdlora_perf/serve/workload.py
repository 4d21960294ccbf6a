"""What is asked of the servers: the points of a sweep, and the named sweeps."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, product
from typing import Literal, get_args

from bdlora_perf.report.schema import Point
from bdlora_perf.serve.trace import TracedRequest
from bdlora_sglang.errors import BDLoRAError

Distribution = Literal["identical", "uniform", "zipf", "distinct"]
DISTRIBUTIONS: tuple[Distribution, ...] = get_args(Distribution)

# Where the number of prompts is not given: so many for each request in flight, or so many seconds of arrivals, and
# never fewer than a 99th percentile needs.
_WAVES = 8
_SECONDS = 60
_FEWEST_PROMPTS = 100


@dataclass(frozen=True)
class Workload:
    """One point of a sweep. Lengths are in tokens.

    Attributes:
        concurrency: requests in flight; None where ``request_rate`` or ``trace`` is given.
        request_rate: mean arrivals a second, a Poisson process.
        input_len, output_len: longest prompt and longest answer.
        shortest: lengths are uniform between this part of the longest and the longest; 1 fixes them.
        adapters: how many the server knows.
        slots: how many of them it holds on the GPU at a time.
        distribution: which adapter a request asks for. identical: all the same one; uniform: drawn evenly; zipf: the
            i-th with a weight of ``i ** -alpha``; distinct: each in turn, so that no two requests in flight share one.
        rank: r of plain LoRA; the other systems' adapters are matched to it.
        num_prompts: requests of one run.
        trace: requests to replay, in place of the lengths and arrivals.
    """

    concurrency: int | None
    request_rate: float | None
    input_len: int
    output_len: int
    shortest: float
    adapters: int
    slots: int
    distribution: Distribution
    alpha: float
    rank: int
    num_prompts: int
    trace: tuple[TracedRequest, ...] = field(default=(), repr=False)

    @property
    def deployment(self) -> tuple[int, int, int]:
        """What a server must be started anew for: adapters, slots and rank."""
        return self.adapters, self.slots, self.rank

    def server_name(self, system: str) -> str:
        """Of such a server of a system, for its log."""
        return f"{system}-a{self.adapters}-s{self.slots}-r{self.rank}"

    @property
    def kv_tokens(self) -> int:
        """Tokens in the KV cache when as many requests as there can be are at their longest (some, for arrivals)."""
        longest = max((t.input_len + t.output_len for t in self.trace), default=self.input_len + self.output_len)
        return (self.concurrency or 256) * longest

    def point(self) -> Point:
        """The coordinates of its samples in the report: what was asked, and nothing of who was asked."""
        load: Point = {"concurrency": self.concurrency, "request_rate": self.request_rate}
        if self.trace:
            load = {"trace_requests": len(self.trace)}
        else:
            load |= {"input_len": self.input_len, "output_len": self.output_len}
        known = {name: value for name, value in load.items() if value is not None}
        return {**known, "adapters": self.adapters, "slots": self.slots, "distribution": self.distribution}

    def lengths(self, rng: random.Random) -> list[tuple[int, int]]:
        """Of every request the prompt and the answer."""
        if self.trace:
            return [(traced.input_len, traced.output_len) for traced in self.trace]
        bounds = [(max(1, int(longest * self.shortest)), longest) for longest in (self.input_len, self.output_len)]
        return [(rng.randint(*bounds[0]), rng.randint(*bounds[1])) for _ in range(self.num_prompts)]

    def arrivals(self, rng: random.Random) -> Sequence[float | None]:
        """Seconds after the first at which each request is sent; None where a place must be free first."""
        if self.trace:
            return [traced.at for traced in self.trace]
        if self.request_rate is None:
            return [None] * self.num_prompts
        gaps = (rng.expovariate(self.request_rate) for _ in range(self.num_prompts - 1))
        return [0.0, *accumulate(gaps)]

    def choose(self, rng: random.Random) -> list[int]:
        """The adapter of every request, by number; a trace may name its own."""
        count, everyone = len(self.trace) or self.num_prompts, range(self.adapters)
        if self.distribution == "identical":
            drawn = [0] * count
        elif self.distribution == "distinct":
            drawn = [i % self.adapters for i in range(count)]
        else:
            weights = [(i + 1) ** -self.alpha if self.distribution == "zipf" else 1.0 for i in everyone]
            drawn = rng.choices(everyone, weights, k=count)
        named = [traced.adapter for traced in self.trace] or [None] * count
        return [number if own is None else own for number, own in zip(drawn, named, strict=True)]


@dataclass(frozen=True)
class Sweep:
    """Every combination of its values; ``concurrency``, ``request_rate`` and ``trace`` exclude one another.

    ``slots``: None holds every adapter in a slot. ``waves``: requests of one run for each in flight.
    """

    concurrency: tuple[int, ...] = (1, 8, 32)
    request_rate: tuple[float, ...] = ()
    trace: tuple[TracedRequest, ...] = ()
    input_len: tuple[int, ...] = (512,)
    output_len: tuple[int, ...] = (128,)
    shortest: float = 1.0
    adapters: tuple[int, ...] = (8,)
    slots: int | None = None
    distribution: tuple[Distribution, ...] = ("uniform",)
    alpha: float = 1.0
    rank: tuple[int, ...] = (16,)
    num_prompts: int | None = None
    waves: int | None = None

    def workloads(self) -> list[Workload]:
        """The points, those of one deployment side by side.

        Raises:
            BDLoRAError: more than one kind of load, none, or a distribution that the adapters do not allow.
        """
        if sum(map(bool, (self.concurrency, self.request_rate, self.trace))) != 1:
            raise BDLoRAError(
                f"--concurrency, --request-rate, --trace: found {self.concurrency}, {self.request_rate} and "
                f"{len(self.trace)} requests, expected one of them"
            )
        loads: list[tuple[int | None, float | None]] = [(c, None) for c in self.concurrency]
        loads += [(None, rate) for rate in self.request_rate] or ([(None, None)] if self.trace else [])
        workloads = []
        for adapters, rank, (concurrency, rate), input_len, output_len, distribution in product(
            self.adapters, self.rank, loads, self.input_len, self.output_len, self.distribution
        ):
            slots = min(self.slots or adapters, adapters)
            _check_distribution(distribution, adapters, concurrency)
            workloads.append(
                Workload(
                    concurrency,
                    rate,
                    input_len,
                    output_len,
                    self.shortest,
                    adapters,
                    slots,
                    distribution,
                    self.alpha,
                    rank,
                    len(self.trace) or self.num_prompts or _default_prompts(concurrency, rate, self.waves),
                    self.trace,
                )
            )
        return workloads


def _check_distribution(distribution: Distribution, adapters: int, concurrency: int | None) -> None:
    if distribution in ("zipf", "distinct") and adapters < 2:
        raise BDLoRAError(f"--adapters {adapters}: found {distribution} requests, expected two adapters at least")
    if distribution == "distinct" and concurrency is not None and adapters < concurrency:
        raise BDLoRAError(
            f"--adapters {adapters}: found distinct requests with {concurrency} in flight, expected an adapter for each"
        )


def _default_prompts(concurrency: int | None, request_rate: float | None, waves: int | None) -> int:
    if waves is not None and concurrency is not None:
        return waves * concurrency
    prompts = concurrency * _WAVES if concurrency is not None else math.ceil((request_rate or 0) * _SECONDS)
    return max(prompts, _FEWEST_PROMPTS)


@dataclass(frozen=True)
class Preset:
    """A named sweep. ``goodput``: bounds as SGLang's ``--goodput`` takes them, in milliseconds."""

    description: str
    sweep: Sweep
    systems: tuple[str, ...] = ("base", "bd-2r", "lora", "lora-fully-sharded")
    param_ratio: tuple[float, ...] = (1.0,)
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
        systems=("base", "bd-2r", "lora", "lora-fully-sharded"),
        param_ratio=(),
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
        param_ratio=(),
        model="llama-3.1-8b",
        tp=8,
    ),
    # S-LoRA (arXiv 2311.03285), section 7: lengths uniform in [8, 512] each, rank 8 in setting S1, adapters drawn by a
    # power law, goodput as first token within 6 s, arrivals from a gamma process: at its usual coefficient of
    # variation, 1, that is the Poisson process used here. S-LoRA serves up to 2000 adapters from host memory.
    "s-lora": Preset(
        "S-LoRA's synthetic workload: Poisson arrivals, adapters by Zipf's law, lengths from 8 to 512.",
        Sweep(
            concurrency=(),
            request_rate=(1.0, 2.0, 4.0),
            input_len=(512,),
            output_len=(512,),
            shortest=8 / 512,
            adapters=(200,),
            slots=32,
            distribution=("zipf",),
            rank=(8,),
        ),
        goodput=("ttft:6000",),
    ),
}
