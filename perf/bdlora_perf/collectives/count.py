"""Collectives of a running engine, counted in the traces that PyTorch's profiler writes for each rank.

SGLang starts the profiler itself (``/start_profile``, ``Engine.start_profile`` with ``activities=["CPU"]`` and
``record_shapes=True``), so what is counted is what ran.
"""

import gzip
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Event = Mapping[str, Any]

_TRACE_RANK = re.compile(r"TP-(\d+)")
# Collectives of the model, at whatever level the trace shows them; of nested ones the outermost counts. Broadcasts are
# left out: the scheduler hands requests to the ranks with them.
_OPERATIONS = {
    # What SGLang's GroupCoordinator calls on a GPU, before it chooses between pynccl, its custom all-reduce and others.
    "sglang::inplace_all_reduce": "all_reduce",
    "sglang::outplace_all_reduce": "all_reduce",
    "sglang::flashinfer_allreduce": "all_reduce",
    "sglang::reg_all_gather_into_tensor": "all_gather",
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
# A replayed CUDA graph calls no operation: its kernels are all that a trace has of it, without their sizes.
_KERNELS = {
    "all_reduce": re.compile(r"all_?reduce|cross_device_reduce", re.IGNORECASE),
    "all_gather": re.compile(r"all_?gather", re.IGNORECASE),
}


@dataclass(frozen=True, order=True)
class Collective:
    """A kind of collective and the shape of its input on one rank; None where the trace has no shape."""

    operation: str
    shape: tuple[int, ...] | None

    @property
    def elements(self) -> int:
        return math.prod(self.shape or ())


def traffic_elements(collective: Collective, num_ranks: int) -> float:
    """Elements that each rank receives in a ring algorithm, which is what the papers count.

    Raises:
        KeyError: another operation than all-gather and all-reduce.
    """
    elements = collective.elements * (num_ranks - 1)
    return {"all_gather": elements, "all_reduce": 2 * elements / num_ranks}[collective.operation]


def read_traces(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """The events of all traces in ``folder``, by TP rank.

    Raises:
        ValueError: there is no trace of a TP rank in the folder.
    """
    traces: dict[int, list[dict[str, Any]]] = {}
    for path in sorted(folder.rglob("*.trace.json*")):
        match = _TRACE_RANK.search(path.name)
        if match is not None:
            opener = gzip.open if path.suffix == ".gz" else open
            with opener(path, "rt", encoding="utf-8") as file:
                traces.setdefault(int(match[1]), []).extend(json.load(file)["traceEvents"])
    if not traces:
        raise ValueError(f"{folder}: found no trace of a TP rank, expected *TP-<rank>*.trace.json(.gz)")
    return traces


def count_collectives(folder: Path) -> dict[int, Counter[Collective]]:
    """Collectives by TP rank, from all traces in ``folder``; raises `ValueError` where there is none."""
    return {rank: Counter(each for _, each in collectives(events)) for rank, events in read_traces(folder).items()}


def collectives(events: Sequence[Event]) -> list[tuple[Event, Collective]]:
    """The collectives of one rank's trace with their events: operations, the outermost of nested ones, and the kernels
    that replayed graphs started."""
    called, kernels = [], []
    for event in sorted(events, key=lambda event: (event.get("ts", 0), -event.get("dur", 0))):
        name = event.get("name", "")
        if (operation := _OPERATIONS.get(name)) is not None:
            called.append((event, Collective(operation, _smallest(event["args"].get("Input Dims")))))
        elif event.get("cat") == "kernel":
            kernels += [(event, Collective(found, None)) for found, name_of in _KERNELS.items() if name_of.search(name)]
    outermost: list[tuple[Event, Collective]] = []
    ends: dict[tuple[Any, Any], float] = {}
    for event, collective in called:
        thread = event.get("pid"), event.get("tid")
        if event["ts"] >= ends.get(thread, -math.inf):
            outermost.append((event, collective))
            ends[thread] = event["ts"] + event.get("dur", 0)
    replays = {event["args"]["correlation"] for event in events if event.get("name") == "cudaGraphLaunch"}
    return outermost + [(event, found) for event, found in kernels if event["args"].get("correlation") in replays]


def _smallest(dims: Any) -> tuple[int, ...] | None:
    """all_gather's first argument is its output; the smallest tensor is what one rank puts in."""
    shapes = [tuple(shape) for shape in _shapes(dims)]
    return min(shapes, key=math.prod) if shapes else None


def _shapes(dims: Any) -> list[list[int]]:
    """Every tensor shape in the profiler's nested lists."""
    if not dims:
        return []
    if all(isinstance(size, int) for size in dims):
        return [dims]
    return [shape for inner in dims if isinstance(inner, list) for shape in _shapes(inner)]
