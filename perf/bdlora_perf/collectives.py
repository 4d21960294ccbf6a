"""Collectives of a running engine, counted from the trace that PyTorch's profiler writes for each rank.

SGLang starts the profiler itself (``/start_profile``, ``Engine.start_profile`` with ``activities=["CPU"]`` and
``record_shapes=True``), so what is counted is what ran.
"""

import gzip
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Collectives of the model. Broadcasts are left out: the scheduler hands requests to the ranks with them.
_OPERATIONS = {
    "c10d::allreduce_": "all_reduce",
    "c10d::allgather_": "all_gather",
    "c10d::_allgather_base_": "all_gather",
    "c10d::reduce_scatter_": "reduce_scatter",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::alltoall_": "all_to_all",
    "c10d::alltoall_base_": "all_to_all",
}
_TRACE_RANK = re.compile(r"TP-(\d+)")


@dataclass(frozen=True)
class Collective:
    """A kind of collective and the shape of its input on one rank."""

    operation: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def count_collectives(folder: Path) -> dict[int, Counter[Collective]]:
    """Collectives by TP rank, from all traces in ``folder``.

    Raises:
        ValueError: there is no trace of a TP rank in the folder.
    """
    counts: dict[int, Counter[Collective]] = {}
    for path in sorted(folder.rglob("*.trace.json*")):
        match = _TRACE_RANK.search(path.name)
        if match is not None:
            counts.setdefault(int(match[1]), Counter()).update(_count_trace(path))
    if not counts:
        raise ValueError(f"{folder}: found no trace of a TP rank, expected *TP-<rank>*.trace.json(.gz)")
    return counts


def _count_trace(path: Path) -> Counter[Collective]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    return Counter(_collective(event) for event in events if event.get("name") in _OPERATIONS)


def _collective(event: Mapping[str, Any]) -> Collective:
    # all_gather's first argument is its output; the smallest tensor is what one rank puts in.
    tensors = [tuple(shape) for shape in _shapes(event["args"]["Input Dims"])]
    return Collective(_OPERATIONS[event["name"]], min(tensors, key=math.prod))


def _shapes(dims: Any) -> list[list[int]]:
    """Every tensor shape in the profiler's nested lists."""
    if not dims:
        return []
    if all(isinstance(size, int) for size in dims):
        return [dims]
    return [shape for inner in dims if isinstance(inner, list) for shape in _shapes(inner)]
