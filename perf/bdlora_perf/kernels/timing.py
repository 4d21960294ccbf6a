"""Times of GPU calls: CUDA graphs of many calls, replayed in turn."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

_COPY_BYTES = 2**31
_ROUNDS = 9


@dataclass(frozen=True)
class CapturedCalls:
    """A graph of ``num_calls`` calls. It runs on memory that only ``call`` keeps from being given to others."""

    graph: torch.cuda.CUDAGraph
    num_calls: int
    call: Callable[[int], object]


def capture(call: Callable[[int], object], sets: int, num_calls: int) -> CapturedCalls:
    """Capture calls with set after set. They run before, on the same stream: what is compiled, chosen or kept for a
    batch is then there."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for n in range(min(sets, 2)):
            call(n)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for n in range(num_calls):
            call(n % sets)
    return CapturedCalls(graph, num_calls, call)


def time_calls(captured: Mapping[str, CapturedCalls], rounds: int = _ROUNDS) -> dict[str, list[float]]:
    """Microseconds of one call: ``rounds`` figures each. In a round all run in turn; the first round is dropped."""
    times: dict[str, list[float]] = {name: [] for name in captured}
    for measured_round in range(rounds + 1):
        for name, calls in captured.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            # The second one is launched while the first runs: its time has no launch of a graph in it.
            calls.graph.replay()
            start.record()
            calls.graph.replay()
            stop.record()
            stop.synchronize()
            if measured_round:
                times[name].append(start.elapsed_time(stop) * 1000 / calls.num_calls)
    return times


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """GB/s of a large device copy, read and written, and microseconds of the smallest launch in a graph."""
    source, target = (torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    captured = {
        "copy": capture(lambda _: target.copy_(source), 1, 4),
        "launch": capture(lambda _: target[:4].zero_(), 1, 200),
    }
    medians = {name: statistics.median(times) for name, times in time_calls(captured).items()}
    return {"copy_gb_per_s": 2 * _COPY_BYTES / medians["copy"] / 1000, "launch_us": medians["launch"]}
