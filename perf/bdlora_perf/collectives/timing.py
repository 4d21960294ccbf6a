"""How long a collective of each size takes on this machine's backend, with nothing else going on."""

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

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from bdlora_sglang.serving.cpu.cores import physical_cores, share_out
from bdlora_sglang.serving.cpu.process_group import BACKEND, register_backend

_WARMUPS = 3
_REPETITIONS = 15


@dataclass(frozen=True)
class Message:
    """A collective to time: ``num_bytes`` is what one rank puts in."""

    operation: str
    num_bytes: int


@dataclass(frozen=True)
class Timing:
    """The median of some repetitions in one round, on the slowest rank."""

    message: Message
    round: int
    microseconds: float


def backend() -> str:
    """The backend that the engine's ranks use on this machine."""
    return "nccl" if torch.cuda.is_available() else BACKEND


def time_collectives(messages: Sequence[Message], num_ranks: int, rounds: int, seed: int) -> list[Timing]:
    """Every message in every round, in an order that differs from round to round.

    Raises:
        RuntimeError: a rank failed; there are fewer GPUs than ranks, for one.
    """
    with tempfile.TemporaryDirectory() as folder:
        # One rank a process, as in a server; the ranks meet through a file, so that no port is needed.
        arguments = (num_ranks, list(messages), rounds, seed, folder)
        spawn(_run_rank, arguments, nprocs=num_ranks)  # type: ignore[no-untyped-call]
        medians = [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]
    return [
        Timing(Message(operation, num_bytes), round_, max(rank[i][3] for rank in medians))
        for i, (operation, num_bytes, round_, _) in enumerate(medians[0])
    ]


def _run_rank(rank: int, num_ranks: int, messages: list[Message], rounds: int, seed: int, folder: str) -> None:
    if backend() == "nccl":
        torch.cuda.set_device(rank)
        device = torch.device("cuda", rank)
    else:
        cores = share_out(physical_cores(os.sched_getaffinity(0)), num_ranks)[rank]
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(len(cores))
        register_backend()
        device = torch.device("cpu")
    # PyTorch has a new name for all_gather_into_tensor, which older versions do not know.
    warnings.filterwarnings("ignore", category=FutureWarning)
    dist.init_process_group(backend(), init_method=f"file://{folder}/meet", rank=rank, world_size=num_ranks)
    rng = random.Random(seed)  # the same order on every rank
    rows = [
        (message.operation, message.num_bytes, round_, _median_microseconds(message, num_ranks, device))
        for round_ in range(1, rounds + 1)
        for message in rng.sample(messages, len(messages))
    ]
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def _median_microseconds(message: Message, num_ranks: int, device: torch.device) -> float:
    data = torch.zeros(message.num_bytes, dtype=torch.uint8, device=device)
    gathered = torch.zeros(num_ranks * message.num_bytes, dtype=torch.uint8, device=device)
    times = []
    for repetition in range(_WARMUPS + _REPETITIONS):
        dist.barrier()
        _synchronize(device)
        start = time.perf_counter()
        if message.operation == "all_gather":
            dist.all_gather_into_tensor(gathered, data)
        else:
            dist.all_reduce(data)
        _synchronize(device)
        if repetition >= _WARMUPS:
            times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
