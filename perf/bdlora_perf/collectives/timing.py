"""How long a collective of each size takes, with nothing else going on, through the engine's own group.

That is SGLang's GroupCoordinator, which chooses by size between its custom all-reduce, pynccl and others on GPUs.
"""

import json
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from bdlora_sglang.serving.cpu.cores import physical_cores, share_out
from bdlora_sglang.serving.cpu.process_group import BACKEND, register_backend
from bdlora_sglang.serving.hardware import PLATFORM_NAME

_WARMUPS = 3
_REPETITIONS = 15


@dataclass(frozen=True, order=True)
class Message:
    """A collective to time: ``num_bytes`` is what one rank puts in."""

    operation: str
    num_bytes: int


def backend() -> str:
    """The backend that the engine's ranks use on this machine."""
    return "nccl" if torch.cuda.is_available() else BACKEND


def time_collectives(
    messages: Sequence[Message], num_ranks: int, rounds: int, seed: int
) -> list[tuple[Message, int, float]]:
    """Every message in every round (from 1), in an order that differs from round to round.

    Returns:
        Message, round, and microseconds: the median of some repetitions, on the slowest rank.

    Raises:
        RuntimeError: a rank failed; there are fewer GPUs than ranks, for one.
    """
    with tempfile.TemporaryDirectory() as folder:
        # One rank a process, as in a server; the ranks meet through a file, so that no port is needed.
        arguments = (num_ranks, list(messages), rounds, seed, folder)
        spawn(_run_rank, arguments, nprocs=num_ranks)  # type: ignore[no-untyped-call]
        by_rank = [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]
    alike = zip(*by_rank, strict=True)
    return [(Message(*rows[0][:2]), rows[0][2], max(median for *_, median in rows)) for rows in alike]


def _run_rank(rank: int, num_ranks: int, messages: list[Message], rounds: int, seed: int, folder: str) -> None:
    if backend() == "nccl":
        torch.cuda.set_device(rank)
        device = torch.device("cuda", rank)
    else:
        cores = share_out(physical_cores(os.sched_getaffinity(0)), num_ranks)[rank]
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(len(cores))
        register_backend()
        os.environ.setdefault("SGLANG_PLATFORM", PLATFORM_NAME)  # before SGLang is imported
        device = torch.device("cpu")
    warnings.filterwarnings("ignore", category=FutureWarning)
    dist.init_process_group(backend(), init_method=f"file://{folder}/meet", rank=rank, world_size=num_ranks)
    from sglang.srt.distributed.parallel_state import init_model_parallel_group

    custom = None if backend() == "nccl" else False
    group = init_model_parallel_group(
        [[*range(num_ranks)]], rank, backend(), use_custom_allreduce=custom, group_name="timing"
    )
    rng = random.Random(seed)  # the same order on every rank
    rows = [
        (message.operation, message.num_bytes, round_, _median_microseconds(message, group, device))
        for round_ in range(1, rounds + 1)
        for message in rng.sample(messages, len(messages))
    ]
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def _median_microseconds(message: Message, group: Any, device: torch.device) -> float:
    # The type of a model: SGLang's custom all-reduce takes no bytes.
    data = torch.zeros(max(1, message.num_bytes // 2), dtype=torch.bfloat16, device=device)
    times = []
    for repetition in range(_WARMUPS + _REPETITIONS):
        dist.barrier()
        _synchronize(device)
        start = time.perf_counter()
        if message.operation == "all_gather":
            group.all_gather(data, dim=0)
        else:
            group.all_reduce(data)
        _synchronize(device)
        if repetition >= _WARMUPS:
            times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
