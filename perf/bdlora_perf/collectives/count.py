"""Collectives of a running engine, counted in the traces that PyTorch's profiler writes for each rank.

SGLang starts the profiler itself (``/start_profile``, ``Engine.start_profile`` with ``activities=["CPU"]`` and
``record_shapes=True``), so what is counted is what ran.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdlora_perf.collectives.trace import read_traces

# Collectives of the model. Broadcasts are left out: the scheduler hands requests to the ranks with them.
_OPERATIONS = {
    # Those over shared memory (`SharedMemoryGroup`) do not pass through PyTorch's own.
    "bdlora::all_reduce": "all_reduce",
    "bdlora::all_gather": "all_gather",
    "c10d::allreduce_": "all_reduce",
    "c10d::allgather_": "all_gather",
    "c10d::_allgather_base_": "all_gather",
    "c10d::reduce_scatter_": "reduce_scatter",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::alltoall_": "all_to_all",
    "c10d::alltoall_base_": "all_to_all",
}


@dataclass(frozen=True, order=True)
class Collective:
    """A kind of collective and the shape of its input on one rank."""

    operation: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def traffic_elements(collective: Collective, num_ranks: int) -> float:
    """Elements that each rank receives in a ring algorithm, which is what the papers count.

    Raises:
        KeyError: another operation than all-gather and all-reduce.
    """
    elements = collective.elements * (num_ranks - 1)
    return {"all_gather": elements, "all_reduce": 2 * elements / num_ranks}[collective.operation]


def count_collectives(folder: Path) -> dict[int, Counter[Collective]]:
    """Collectives by TP rank, from all traces in ``folder``; raises `ValueError` where there is none."""
    return {
        rank: Counter(found for event in events if (found := collective_of(event)) is not None)
        for rank, events in read_traces(folder).items()
    }


def collective_of(event: Mapping[str, Any]) -> Collective | None:
    """The collective that an event of a trace is; None for any other event."""
    operation = _OPERATIONS.get(event.get("name", ""))
    if operation is None:
        return None
    # all_gather's first argument is its output; the smallest tensor is what one rank puts in.
    tensors = [tuple(shape) for shape in _shapes(event["args"]["Input Dims"])]
    return Collective(operation, min(tensors, key=math.prod))


def _shapes(dims: Any) -> list[list[int]]:
    """Every tensor shape in the profiler's nested lists."""
    if not dims:
        return []
    if all(isinstance(size, int) for size in dims):
        return [dims]
    return [shape for inner in dims if isinstance(inner, list) for shape in _shapes(inner)]
