"""LoRA's kernels for a GPU that is not there: every launch of every system, and what the latency model makes of it.

Nothing is timed. Kernels are launched by their own host code on PyTorch's "meta" device, compiled for the architecture
(`bdlora_perf.kernels.absent_gpu`), and Triton keeps what it has compiled by kernel, constants and architecture.
"""

import itertools
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from bdlora_perf.kernels.latency import CONSTANTS, KNOWN, Constants, corners, describe_launch, layer_time
from bdlora_perf.kernels.shapes import LAYERS, Case, Phase

DECODE_TOKENS, DECODE_ADAPTERS = (1, 8, 32, 64, 256), (1, 8, 32)
PREFILLS = ((2048, 8), (8192, 8))
RANKS = (2, 4, 8, 16, 32, 64)
TP = 8
# BD-LoRA of rank 2 r in 8 blocks at TP 8 has the local rank r / 4: plain LoRA's r is four times ours.
MATCHED_FACTOR = 4
MATCHED = "triton_v2_r2"
SYSTEM_NAMES = ("bdlora", "csgmv", "triton", "triton_v2")
# What `read` finds, by name.
Row = dict[str, Any]


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
    # Those of one layer and rank share their kernels: whoever compiles them for the first has them for all.
    groups: dict[object, list[Case]] = defaultdict(list)
    for case in cases:
        groups[case.rank, case.model, case.layer, case.tp].append(case)
    jobs, read_group = list(groups.values()), partial(_read_group, capability, systems)
    workers = min(len(jobs), len(os.sched_getaffinity(0)))
    if workers <= 1:
        yield from zip(map(len, jobs), map(read_group, jobs), strict=True)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from zip(map(len, jobs), pool.map(read_group, jobs), strict=True)


def _read_group(capability: int, systems: Sequence[str], cases: Sequence[Case]) -> list[Row]:
    return [read(system, case, capability) for case in cases for system in systems]


def read(system: str, case: Case, capability: int) -> Row:
    """What a system launches at a case, and the model's microseconds that LoRA adds to the layer.

    Returns:
        The fields of the case, at the rank of our factors also where the system serves another one, and
        system, case: as given, and ``overlap``: whether its first launch runs beside the base layer's product.
        kernels: of each launch what `describe_launch` says.
        needed: bytes that any kernel must move; ``requested``: what the programs ask for together.
        served: as the system runs, for the nominal constants (``served_us``) and then every corner of their ranges.
        serial_us: every launch behind the base layer's product.
    """
    # Imports SGLang, which takes seconds: only where something is compiled.
    from bdlora_perf.kernels.absent_systems import launches
    from bdlora_perf.kernels.static_work import works_of

    at = replace(case, rank=MATCHED_FACTOR * case.rank) if system == MATCHED else case
    launched, way = launches("triton_v2" if system == MATCHED else system, at, capability)
    works, architecture = works_of(launched, at, way.all_slots), KNOWN[capability]

    def added(overlap: bool, constants: Constants) -> float:
        return round(layer_time(works, case.shape(), case.tokens, overlap, architecture, constants), 3)

    served = [added(way.overlap, constants) for constants in corners()]
    return {
        **case.point,
        "system": system,
        "case": case,
        "overlap": way.overlap,
        "kernels": [describe_launch(work, architecture) for work in works],
        "needed": at.floor_bytes(),
        "requested": round(sum(work.requested_bytes for work in works)),
        "served": served,
        "served_us": served[0],
        "serial_us": added(False, CONSTANTS),
    }
