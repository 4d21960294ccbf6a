"""A latency model of LoRA kernels: one formula for every system, and no constant that was fitted to a kernel of ours.

A launch takes as long as the slowest of these:

- its programs, in waves of as many as the GPU holds at a time. A program takes the loads that must follow each other
  before its first product (`bdlora_perf.kernels.dependent_loads`), one latency for each further step of its loop over
  as many as are in flight together, and the reads that follow the loop;
- after the first program's first loads: what must come from memory, at the bandwidth of memory; what all programs
  request, at that of the second-level cache; and the products, tiles filled up, at the tensor cores' rate.

In between come the gaps between kernels. Where the first kernel runs beside the base layer's product, only what it
takes longer than the product counts, its share of the memory's bandwidth, and the join of the two streams.

Not in the model: time to issue instructions, bank conflicts, the table look-ups of the address translation, clocks that
change. Times are good for the order of systems, as far as `RANGES` do not turn it round, not for what a GPU will show.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from math import ceil
from typing import Any

from bdlora_perf.estimate.hardware import GPU, GPUS, Constant
from bdlora_perf.kernels.absent_gpu import MachineCode
from bdlora_perf.kernels.dependent_loads import Chain
from bdlora_perf.kernels.shapes import Layer

_HOPPER = "Luo et al., arXiv 2402.13499 and 2501.12084"
_REVIEW = "a reading of these kernels' machine code in this project, before this model"

# Of a launch, by name.
Figures = dict[str, str | int | float]


@dataclass(frozen=True)
class Constants:
    """Microseconds of a read in each level, between two kernels of a stream, and to join two streams.

    ``whole_waves``: the last wave takes as long as a full one, else its share. ``keeps``: the second-level cache keeps
    tables, h and prefetched factors while a base layer's weights of more than its size stream through it.
    """

    l1: float = 0.02
    l2: float = 0.25
    memory: float = 0.65
    gap: float = 1.0
    join: float = 0.7
    whole_waves: bool = True
    keeps: bool = False


CONSTANTS = Constants()
SOURCES: Mapping[str, str] = {
    "l1": f"{_HOPPER}: 38 to 41 clocks",
    "l2": f"{_REVIEW}; {_HOPPER}: about 260 clocks, 0.15 to 0.19 us, when nothing else runs",
    "memory": f"{_REVIEW}; {_HOPPER}: about 470 clocks, 0.27 to 0.33 us, when nothing else runs",
    "gap": f"{_REVIEW}; hazyresearch.stanford.edu/blog/2025-05-27-no-bubbles: 1.3 us for start and end of a kernel",
    "join": _REVIEW,
}
# Between these every constant may lie: a comparison that turns round within them is a tie.
RANGES: Mapping[str, tuple[float | bool, float | bool]] = {
    "l2": (0.18, 0.25),
    "memory": (0.45, 0.65),
    "gap": (0.7, 1.3),
    "whole_waves": (True, False),
    "keeps": (True, False),
}


def corners() -> Iterator[Constants]:
    """The nominal constants, then all combinations of the ends of the ranges."""
    yield CONSTANTS
    for values in product(*RANGES.values()):
        ends: dict[str, Any] = dict(zip(RANGES, values, strict=True))
        yield replace(CONSTANTS, **ends)


@dataclass(frozen=True)
class Architecture:
    """A GPU. Of a multiprocessor: registers, warps, programs and bytes of shared memory; of all: the rest.

    ``l2_gb_per_s`` is what is read from the second-level cache; ``mma`` the share of the tensor cores' peak that the
    instructions of before Hopper reach (``mma.sync``).
    """

    gpu: GPU
    multiprocessors: int
    shared: int
    l2_bytes: float
    l2_gb_per_s: float
    mma: float
    registers: int = 65536
    warps: int = 64
    programs: int = 32

    def resident(self, code: MachineCode) -> int:
        """Programs that a multiprocessor holds: NVIDIA's occupancy calculator."""
        # Registers are given out by 8 a thread, shared memory with 1 KiB a program that the system keeps.
        by_registers = self.registers // (-(-code.registers // 8) * 8 * 32 * code.warps)
        by_shared = self.shared // (code.shared + 1024)
        return min(by_registers, by_shared, self.warps // code.warps, self.programs)

    def waves(self, programs: int, code: MachineCode | None) -> float:
        """How often so many programs fill the GPU; one of a product of cuBLAS (no code) does so."""
        return programs / (1 if code is None else self.resident(code) * self.multiprocessors)

    @property
    def bytes_per_us(self) -> float:
        """A large copy reaches about 90% of the data sheet's bandwidth (the review: 3.0 of 3.35 TB/s)."""
        return self.gpu.bandwidth.value * 1e3 * 0.9


# Multiprocessors, shared memory, cache: NVIDIA's tuning guides for Ampere, Hopper and Blackwell, and its whitepapers.
# The cache's bandwidth: 5120 bytes a clock (A100 whitepaper; H100: pmc.ncbi.nlm.nih.gov/articles/PMC10448217, table 3;
# B200: assumption, the same a clock). mma.sync: Luo et al. for H100 (63% of the peak); B200: assumption, the same.
KNOWN: Mapping[int, Architecture] = {
    80: Architecture(GPUS["a100"], 108, 164 * 1024, 40 * 2**20, 7219, 1.0),
    90: Architecture(GPUS["h100"], 132, 228 * 1024, 50 * 2**20, 8986, 0.63),
    100: Architecture(GPUS["b200"], 148, 228 * 1024, 126 * 2**20, 10060, 0.63),
}


@dataclass(frozen=True)
class Work:
    """What a launch has to do.

    Attributes:
        programs: those that have tokens.
        memory_bytes: factors that come from memory, each once; ``fetched_bytes`` those that do so where the cache has
            lost what was fetched before.
        requested_bytes: what all programs read and write of factors, x, h and y together.
        activation_bytes: x or y, read and written, as often as it must be: from memory where it is larger than the
            cache.
        operations: floating-point operations of the products, with what fills up their tiles.
        more_memory: further steps of a program's loop, over those in flight together: reads of memory.
        more_l2: the same: reads of the second-level cache, and those after the loop. Means over the programs.
        longest_l2: that of the program with most.
        chain: loads before the first product.
        code: None for a product of cuBLAS, of which nothing is known: it counts as one program.
        grid: all programs; those without tokens read one number and end.
    """

    programs: int
    memory_bytes: float
    requested_bytes: float
    activation_bytes: float
    operations: float
    more_memory: float = 0
    more_l2: float = 0
    longest_l2: float = 0
    fetched_bytes: float = 0
    chain: Chain = field(default_factory=Chain)
    code: MachineCode | None = None
    grid: int = 1


def launch_time(work: Work, architecture: Architecture, constants: Constants, cold: bool = False) -> tuple[float, str]:
    """Microseconds of a launch without the gap before it, and what bounds them.

    ``cold``: the second-level cache has lost what was in it.
    """
    cold = cold and not constants.keeps
    l1, l2, memory_us = constants.l1, constants.l2, constants.memory
    # The first wave brings the tables to the cache.
    lead, rest = work.chain.us(l1, memory_us if cold else l2, memory_us), memory_us * work.more_memory
    longest = lead + rest + l2 * work.longest_l2
    mean = work.chain.us(l1, l2, memory_us) + rest + l2 * work.more_l2
    waves = architecture.waves(work.programs, work.code)
    more_waves = (ceil(waves) if constants.whole_waves else waves) - 1
    idle = architecture.waves(work.grid - work.programs, work.code) * l2
    memory = work.memory_bytes + (work.fetched_bytes if cold else 0.0)
    if work.activation_bytes > architecture.l2_bytes:
        memory += work.activation_bytes
    gpu = architecture.gpu
    modern = work.code is None or work.code.has_modern_products
    peak = gpu.matmul.value if modern else gpu.peak.value * architecture.mma
    times = {
        "latency" if waves <= 1 else "waves": longest + max(0.0, more_waves) * mean + idle,
        "memory": lead + memory / architecture.bytes_per_us,
        "cache": lead + work.requested_bytes / (architecture.l2_gb_per_s * 1e3),
        "products": lead + work.operations / (min(peak, gpu.matmul.value) * 1e6),
    }
    bound = max(times, key=times.__getitem__)
    return times[bound], bound


def describe_launch(work: Work, architecture: Architecture) -> Figures:
    """Of a launch programs, registers, spilled bytes, shared bytes, programs that a multiprocessor holds, waves,
    dependent loads before the first product, its time, and what bounds it."""
    code, (us, bound) = work.code, launch_time(work, architecture, CONSTANTS)
    modelled: Figures = {"loads": work.chain.loads, "us": round(us, 2), "bound": bound}
    if code is None:
        unknown = dict.fromkeys(("programs", "registers", "spills", "shared", "resident", "waves"), 0)
        return {"kernel": "cuBLAS", **unknown, **modelled}
    takes = {"registers": code.registers, "spills": code.stack, "shared": code.shared}
    held = {"resident": architecture.resident(code), "waves": round(architecture.waves(work.programs, code), 2)}
    return {"kernel": code.name, "programs": work.programs, **takes, **held, **modelled}


def base_time(layer: Layer, tokens: int, architecture: Architecture, constants: Constants) -> float:
    """Microseconds of the base layer's product in 16-bit types: its weights once, or its operations."""
    weights = layer.inputs * layer.total_outputs
    operations = 2 * weights * tokens / (architecture.gpu.matmul.value * 1e6)
    return constants.memory + max(2 * weights / architecture.bytes_per_us, operations)


def layer_time(
    works: Sequence[Work], layer: Layer, tokens: int, overlap: bool, architecture: Architecture, constants: Constants
) -> float:
    """Microseconds that launches add to a layer, one after the other behind the base layer's product.

    With ``overlap`` the first runs beside it.
    """
    # Tables and h are in the cache before the product, which drives them out for the first launch behind it.
    flushed, behind = 2 * layer.inputs * layer.total_outputs > architecture.l2_bytes, 1 if overlap else 0
    times = [
        constants.gap + launch_time(work, architecture, constants, cold=flushed and i == behind)[0]
        for i, work in enumerate(works)
    ]
    if not overlap:
        return sum(times)
    over = max(0.0, times[0] - base_time(layer, tokens, architecture, constants))
    return over + works[0].memory_bytes / architecture.bytes_per_us + constants.join + sum(times[1:])


def ranges_in_words() -> str:
    return ", ".join(f"{name} {low} to {high}" for name, (low, high) in RANGES.items())


def source_rows(architecture: Architecture) -> dict[str, str]:
    """Every constant with its source, for the settings of a report."""
    rows = {f"model: {name}": f"{getattr(CONSTANTS, name)} us: {source}" for name, source in SOURCES.items()}
    rows["model: ranges"] = ranges_in_words()
    for name in ("bandwidth", "peak", "matmul"):
        constant: Constant = getattr(architecture.gpu, name)
        rows[f"model: {name}"] = f"{constant.value:g} {constant.unit}: {constant.source}"
    for size in fields(Architecture)[1:]:
        rows[f"model: {size.name.replace('_', ' ')}"] = f"{getattr(architecture, size.name):g}"
    return rows
