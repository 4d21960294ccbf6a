"""LoRA's kernels for a GPU that is not there: every launch of every system, and what the latency model makes of it.

Nothing is timed. Kernels are launched by their own host code on PyTorch's "meta" device, compiled for the architecture
(`bdlora_perf.kernels.absent_gpu`), and Triton keeps what it has compiled by kernel, constants and architecture.
"""

import itertools
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

from bdlora_perf.kernels.absent_gpu import MachineCode
from bdlora_perf.kernels.latency import (
    CONSTANTS,
    KNOWN,
    Architecture,
    Constants,
    Work,
    base_time,
    corners,
    launch_time,
    overlapped,
    serial,
)
from bdlora_perf.kernels.shapes import LAYERS, Case, Phase

DECODE_TOKENS, DECODE_ADAPTERS = (1, 8, 32, 64, 256), (1, 8, 32)
PREFILLS = ((2048, 8), (8192, 8))
RANKS = (2, 4, 8, 16, 32, 64)
TP = 8
# BD-LoRA of rank 2 r in 8 blocks at TP 8 has the local rank r / 4: plain LoRA's r is four times ours.
MATCHED_FACTOR = 4
MATCHED = "triton_v2_r2"
SYSTEM_NAMES = ("bdlora", "csgmv", "triton", "triton_v2")


@dataclass(frozen=True)
class Row:
    """One system at one case: what it launches, and the model's microseconds that LoRA adds to the layer.

    Attributes:
        case: at the rank of our factors, also where the system serves another one.
        kernels: of each launch programs, registers, spilled bytes, shared bytes, programs that a multiprocessor holds,
            waves, dependent loads before the first product, and what bounds its time, by name.
        needed: bytes that any kernel must move; ``requested``: what the programs ask for together.
        served: as the system runs, for the nominal constants and then for every corner of their ranges.
        serial: every launch behind the base layer's product.
    """

    system: str
    case: Case
    overlap: bool
    kernels: tuple[dict[str, str | int | float], ...]
    needed: int
    requested: int
    served: tuple[float, ...]
    serial: float


@dataclass(frozen=True)
class _Job:
    capability: int
    systems: tuple[str, ...]
    cases: tuple[Case, ...]


def sweep(models: Iterable[str], phases: Sequence[Phase], ranks: Iterable[int]) -> Iterator[Case]:
    """All cases, those of one layer and rank one after the other: their kernels are compiled once."""
    decode = [(tokens, adapters) for tokens in DECODE_TOKENS for adapters in DECODE_ADAPTERS if adapters <= tokens]
    batches = {"decode": decode, "prefill": list(PREFILLS)}
    for rank, model, layer, phase in itertools.product(ranks, models, LAYERS, phases):
        for tokens, adapters in batches[phase]:
            yield Case(model, TP, layer, phase, tokens, adapters, "uniform", rank)


def read_all(
    cases: Iterable[Case], capability: int, systems: Sequence[str] = (*SYSTEM_NAMES, MATCHED)
) -> Iterator[tuple[int, list[Row]]]:
    """The rows of all cases as they come, each time with the number of cases that are done."""
    groups = itertools.groupby(cases, key=lambda case: (case.rank, case.model, case.layer, case.tp))
    jobs = [_Job(capability, tuple(systems), tuple(group)) for _, group in groups]
    workers = min(len(jobs), len(os.sched_getaffinity(0)))
    if workers <= 1:
        yield from ((len(job.cases), _read(job)) for job in jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from ((len(job.cases), rows) for job, rows in zip(jobs, pool.map(_read, jobs), strict=True))


def _read(job: _Job) -> list[Row]:
    return [read(system, case, job.capability) for case in job.cases for system in job.systems]


def read(system: str, case: Case, capability: int) -> Row:
    """What a system launches at a case, and how long the model says that it takes."""
    # Imports SGLang, which takes seconds: only where something is compiled.
    from bdlora_perf.kernels.absent_systems import launches
    from bdlora_perf.kernels.static_work import all_slots_work, work_of

    served = replace(case, rank=MATCHED_FACTOR * case.rank) if system == MATCHED else case
    made = launches("triton_v2" if system == MATCHED else system, served, capability)
    architecture, shape = KNOWN[capability], case.shape()
    launched = (*made.beside, *made.after)
    parts = [(work_of(one, served, before), one) for before, one in zip((None, *launched), launched, strict=False)]
    works: list[tuple[Work, MachineCode | None, int]] = [(work, one.code, one.programs) for work, one in parts]
    if made.all_slots:
        works.insert(0, (all_slots_work(served), None, 1))
    weights = 2 * shape.inputs * shape.total_outputs

    def times(constants: Constants, beside: bool) -> list[float]:
        """Tables and h have been in the cache since before the product, for the first launch behind it."""
        flushed = weights > architecture.l2_bytes
        behind = 1 if beside else 0
        return [
            launch_time(*work, architecture, constants, cold=flushed and i == behind).us for i, work in enumerate(works)
        ]

    def total(constants: Constants) -> float:
        if not made.overlap:
            return serial(times(constants, False), constants)
        first, *rest = times(constants, True)
        base = base_time(shape.inputs, shape.total_outputs, case.tokens, architecture, constants)
        return overlapped(first, works[0][0].memory_bytes, rest, base, architecture, constants)

    return Row(
        system=system,
        case=case,
        overlap=made.overlap,
        kernels=tuple(_describe(*work, architecture) for work in works),
        needed=served.floor_bytes(),
        requested=round(sum(work.requested_bytes for work, _, _ in works)),
        served=tuple(round(total(constants), 3) for constants in corners()),
        serial=round(serial(times(CONSTANTS, False), CONSTANTS), 3),
    )


def _describe(
    work: Work, code: MachineCode | None, grid: int, architecture: Architecture
) -> dict[str, str | int | float]:
    found = launch_time(work, code, grid, architecture, CONSTANTS)
    common: dict[str, str | int | float] = {"loads": work.chain.loads, "us": round(found.us, 2), "bound": found.bound}
    if code is None:
        unknown = dict.fromkeys(("programs", "registers", "spills", "shared", "resident", "waves"), 0)
        return {"kernel": "cuBLAS", **unknown, **common}
    return {
        "kernel": code.name,
        "programs": work.programs,
        "registers": code.registers,
        "spills": code.stack,
        "shared": code.shared,
        "resident": architecture.resident(code),
        "waves": round(found.waves, 2),
        **common,
    }
