"""CPU time of describing a decode batch to the Triton kernels, in a process of its own: in this checkout or in another.

Run as a script it prints the figures as JSON. The tables are on the CPU, so that what would be asynchronous copies to a
GPU is done by the processor, of the old and the new code alike.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bdlora_perf.checkout import Surroundings
    from bdlora_perf.report.schema import Sample

REQUESTS = (1, 32, 256)
_SLOTS = 32
_BATCHES = 200
_SECONDS = 300


def prepare_batches(system: str, round_: int, surroundings: "Surroundings | None") -> "list[Sample]":
    """One sample for each number of requests; raises `BDLoRAError` when the process fails."""
    from bdlora_perf.report.schema import Sample
    from bdlora_sglang.errors import BDLoRAError

    environment = os.environ if surroundings is None else surroundings.environment
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve())],
        env={**environment, "TRITON_INTERPRET": "1"},  # else there are no Triton kernels without a GPU
        cwd=None if surroundings is None else surroundings.folder,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
    )
    if done.returncode != 0:
        raise BDLoRAError(f"preparing batches, {system}: found no figures, expected them:\n{done.stderr[-2000:]}")
    figures: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return [
        Sample(system=system, point={"requests": int(requests)}, round=round_, metrics=metrics)
        for requests, metrics in figures.items()
    ]


def measure(requests: int) -> dict[str, float]:
    """Microseconds of one batch, median of many: the same as before, another one, and one of the base model."""
    import torch
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from bdlora_sglang.serving.backend import BDLoRABackend
    from bdlora_sglang.serving.kernels import choose_kernels

    # By place: in older checkouts the argument has another name.
    kernels: Any = choose_kernels(torch.device("cpu"), _SLOTS, False)
    kernels.reserve_decode_graphs(max(REQUESTS))
    backend: Any = BDLoRABackend(_SLOTS, torch.device("cpu"))
    backend.use(None, kernels)
    batch = SimpleNamespace(forward_mode=ForwardMode.DECODE, batch_size=requests)
    slots = [i % _SLOTS for i in range(requests)]
    kinds: dict[str, Callable[[int], list[int]]] = {
        "prepare_same_us": lambda i: slots,
        "prepare_new_us": lambda i: [(slot + i) % _SLOTS for slot in slots],
        "prepare_base_us": lambda i: [-1] * requests,
    }
    found: dict[str, float] = {}
    for name, slots_of in kinds.items():
        times: list[float] = []
        for i in range(_BATCHES):
            own = slots_of(i)
            start = time.process_time_ns()
            backend.prepare(batch, own, "decode")
            times.append((time.process_time_ns() - start) / 1000)
        found[name] = statistics.median(times)
    return found


if __name__ == "__main__":
    torch_threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    os.environ.update(torch_threads)
    print(json.dumps({requests: measure(requests) for requests in REQUESTS}))
