"""Adapters are read beside the forward: by a thread on each rank, while the scheduler goes on serving.

The threads agree among themselves, over a group of their own. When rank 0's thread knows that all ranks have the
adapter, or that one has failed, its scheduler sends `FinishAdapterLoad` down the stream of requests, which all ranks
read in the same order: so each takes the adapter over at the same point, and no step has a collective more than before.
"""

import ctypes
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from bdlora_sglang.serving.agreement import AllGather, read_together

logger = logging.getLogger(__name__)

# On a machine whose cores are all busy, the forward goes first.
_NICENESS = 10
# Python lets a thread keep the interpreter for 5 ms when another wants it. A forward comes back to it after each of its
# hundreds of operations, and would wait so long each time.
_SWITCH_SECONDS = 1e-4

T = TypeVar("T")


@dataclass(frozen=True)
class FinishAdapterLoad:
    """A message to all schedulers: the load of adapter ``lora_id`` has come to an end, good or bad."""

    lora_id: str


@dataclass(frozen=True)
class _Load(Generic[T]):
    request: Any
    result: "Future[T]"


class AdapterLoader(Generic[T]):
    """One rank's thread, which reads adapters one after the other, and the loads that are under way.

    Called by the scheduler's thread alone, in the same order on every rank.
    """

    def __init__(self, all_gather: AllGather, start_thread: Callable[[], None] = lambda: None) -> None:
        """``start_thread`` is run in the thread before anything else."""
        self._all_gather, self._start_thread = all_gather, start_thread
        self._loads: dict[str, _Load[T]] = {}
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        threading.Thread(target=self._run, name="bdlora-adapter-loader", daemon=True).start()

    def start(self, lora_id: str, request: Any, read: Callable[[], T]) -> None:
        """Begin to read an adapter for ``request``."""
        load = self._loads[lora_id] = _Load(request, Future())

        def job() -> None:
            try:
                load.result.set_result(read_together(read, self._all_gather))
            except Exception as error:
                load.result.set_exception(error)

        self._jobs.put(job)

    def do(self, job: Callable[[], None]) -> None:
        """Run something that takes its time, after the loads that were started before."""
        self._jobs.put(job)

    @property
    def is_busy(self) -> bool:
        """Whether loads are under way."""
        return bool(self._loads)

    def wait(self, seconds: float) -> None:
        """Until a load that is under way has come to an end, or for so long."""
        wait([load.result for load in self._loads.values()], seconds, return_when="FIRST_COMPLETED")

    def finished(self) -> list[FinishAdapterLoad]:
        """On rank 0: the loads that have come to an end on all ranks, until they are taken over."""
        return [FinishAdapterLoad(lora_id) for lora_id, load in self._loads.items() if load.result.done()]

    def take(self, message: FinishAdapterLoad) -> tuple[Any, "Future[T]"]:
        """The request of a load and its result, on every rank."""
        load = self._loads.pop(message.lora_id)
        wait([load.result])  # this rank's thread may be a moment behind rank 0's
        return load.request, load.result

    def _run(self) -> None:
        # As if by the user: a thread may not be as polite as that everywhere.
        with suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        sys.setswitchinterval(_SWITCH_SECONDS)
        _use_one_thread()
        self._start_thread()
        while True:
            job = self._jobs.get()
            try:
                job()
            # Loads report what went wrong themselves; this thread must live on for those to come.
            except Exception:
                logger.exception("A job beside the forwards has failed")


def _use_one_thread() -> None:
    """Let PyTorch's operators run on the calling thread alone.

    Each thread that calls them has an OpenMP pool of its own. With a second one there are more threads than cores, and
    then libgomp lets those of the first sleep after each operator of a forward, which must wake them for the next.
    """
    torch.get_num_threads()  # the first call in a thread sets its number
    with suppress(AttributeError):  # not with every build of PyTorch
        # For this thread; `torch.set_num_threads` would tell MKL for all of them.
        ctypes.CDLL(None).omp_set_num_threads(1)


def gather_errors(ranks: list[int]) -> AllGather:
    """An all-gather among the threads of ``ranks``, on a group that nobody else uses. All ranks must call this."""
    if len(ranks) == 1:
        return lambda error: [error]
    group: Any = dist.new_group(ranks, backend="gloo")

    def all_gather(error: str | None) -> list[str | None]:
        errors: list[str | None] = [None] * len(ranks)
        dist.all_gather_object(errors, error, group=group)
        return errors

    return all_gather


def use_device(device: torch.device, index: int) -> None:
    """Let this thread allocate pinned memory for the rank's own GPU: a new thread's is the first."""
    if device.type != "cpu":
        torch.get_device_module(device).set_device(index)
