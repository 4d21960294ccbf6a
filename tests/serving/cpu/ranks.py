"""Ranks of a group of the shared-memory backend, each a process with one thread."""

import functools
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from bdlora_sglang.serving.cpu.process_group import create_group

# PyTorch has a new name for all_gather_into_tensor.
warnings.filterwarnings("ignore", category=FutureWarning)

_SPAWN = multiprocessing.get_context("spawn")
# What a rank does, in its process; it gets its rank, the number of ranks and the arguments.
Program = Callable[..., None]


def run_ranks(program: Program, size: int, folder: Path, *arguments: Any, busy: int = 0, **options: Any) -> None:
    """Run ``program`` on ``size`` ranks to its end, beside ``busy`` processes that want the same cores.

    ``options`` are `create_group`'s; a rank that fails fails the test, with the ranks' tracebacks.
    """
    with competition(busy):
        ranks = start_ranks(program, size, folder, *arguments, **options)
        for rank in ranks:
            rank.join(800)
        codes = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()
    errors = "\n".join(path.read_text() for path in sorted(folder.glob("error-of-rank-*")))
    assert codes == [0] * size, f"exit codes {codes}\n{errors}"


def start_ranks(program: Program, size: int, folder: Path, *arguments: Any, **options: Any) -> list[BaseProcess]:
    ranks = [
        _SPAWN.Process(target=_run_rank, args=(program, rank, size, folder, arguments, options), daemon=True)
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    return list(ranks)


def _run_rank(
    program: Program, rank: int, size: int, folder: Path, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    torch.set_num_threads(1)
    timeout = options.pop("timeout", timedelta(seconds=120))
    # Under a name of its own: with other limits than the real backend's.
    dist.Backend.register_backend("tested", functools.partial(create_group, **options), devices=["cpu"])
    store = dist.FileStore(str(folder / "meet"), size)
    dist.init_process_group("tested", store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        program(rank, size, *arguments)
    except BaseException:
        (folder / f"error-of-rank-{rank}").write_text(traceback.format_exc())
        raise
    dist.destroy_process_group()


@contextmanager
def competition(processes: int) -> Iterator[None]:
    busy = [_SPAWN.Process(target=_keep_busy, args=(os.getpid(),), daemon=True) for _ in range(processes)]
    for process in busy:
        process.start()
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.join()


def _keep_busy(parent: int) -> None:
    """Alternate between work and sleep, so that the ranks are interrupted again and again."""
    while os.getppid() == parent:
        end = time.perf_counter() + 0.0005
        while time.perf_counter() < end:
            pass
        time.sleep(0.002)
