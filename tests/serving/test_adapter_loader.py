"""Ranks that read adapters in threads take each over at the same point of their request streams."""

import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from bdlora_sglang.serving.adapter_loader import AdapterLoader, FinishAdapterLoad
from bdlora_sglang.serving.slot_guard import SlotGuard

RANKS = 3


class Rank:
    """A scheduler's side of one rank: it takes over what the stream of requests tells it to."""

    def __init__(self, rank: int, all_gather: Callable[[str | None], Sequence[str | None]]) -> None:
        self.rank, self.loader = rank, AdapterLoader[str](all_gather)
        self.seen: list[str] = []
        self.threads: set[str] = set()

    def start(self, lora_id: str, may_read: threading.Event, error: Exception | None = None) -> None:
        def read() -> str:
            self.threads.add(threading.current_thread().name)
            assert may_read.wait(20)
            if error is not None:
                raise error
            return f"{lora_id} of rank {self.rank}"

        self.loader.start(lora_id, f"request for {lora_id}", read)

    def step(self, stream: Sequence[Any]) -> None:
        for message in stream:
            if isinstance(message, FinishAdapterLoad):
                request, result = self.loader.take(message)
                self.seen.append(f"{request}: {result.exception() or result.result()}")
            else:
                self.seen.append(message)


@pytest.fixture
def ranks() -> list[Rank]:
    barrier, errors = threading.Barrier(RANKS, timeout=20), [None] * RANKS

    def all_gather(rank: int) -> Callable[[str | None], Sequence[str | None]]:
        def gather(error: str | None) -> Sequence[str | None]:
            errors[rank] = error  # type: ignore[call-overload]
            barrier.wait()
            gathered = list(errors)
            barrier.wait()
            return gathered

        return gather

    return [Rank(rank, all_gather(rank)) for rank in range(RANKS)]


def test_the_slowest_rank_decides_when_and_nobody_waits_for_it(ranks: list[Rank]) -> None:
    """Two loads; rank 2 is slow with the first, and rank 1 fails with the second. Steps go on meanwhile."""
    fast, slow = threading.Event(), threading.Event()
    fast.set()
    for rank in ranks:
        rank.start("a", slow if rank.rank == 2 else fast)
        rank.start("b", fast, ValueError("broken") if rank.rank == 1 else None)
    for step in range(50):
        assert ranks[0].loader.finished() == [], "a rank is still reading"
        for rank in ranks:
            rank.step([f"step {step}"])
            assert rank.loader.is_busy
    slow.set()
    while ranks[0].loader.is_busy:
        ranks[0].loader.wait(20)
        stream = ["before", *ranks[0].loader.finished(), "after"]
        for rank in ranks:
            rank.step(stream)
    for rank in ranks:
        assert not rank.loader.is_busy
        ends = [entry for entry in rank.seen if "request" in entry]
        assert ends == [f"request for a: a of rank {rank.rank}", "request for b: TP rank 1: broken"]
        # The same point on every rank, whatever else the stream holds.
        assert [e.partition(":")[0] for e in rank.seen] == [e.partition(":")[0] for e in ranks[0].seen]
        assert rank.threads == {"bdlora-adapter-loader"}


def test_what_is_finished_is_told_until_it_is_taken(ranks: list[Rank]) -> None:
    """SGLang may drop what a step adds to the stream, where it receives nothing in that step."""
    may_read = threading.Event()
    may_read.set()
    for rank in ranks:
        rank.start("a", may_read)
    ranks[0].loader.wait(20)
    assert ranks[0].loader.finished() == ranks[0].loader.finished() == [FinishAdapterLoad("a")]
    for rank in ranks:
        rank.step(ranks[0].loader.finished() if rank.rank == 0 else [FinishAdapterLoad("a")])
    assert ranks[0].loader.finished() == []


def test_a_thread_is_prepared_and_does_other_jobs_in_turn() -> None:
    done: list[str] = []
    finished: Future[None] = Future()
    loader = AdapterLoader[str](lambda error: [error], lambda: done.append("prepared"))
    loader.start("a", None, lambda: done.append("read") or "a")  # type: ignore[func-returns-value]
    loader.do(lambda: done.append("other"))
    loader.do(lambda: 1 // 0)  # type: ignore[arg-type,return-value]
    loader.do(lambda: finished.set_result(None))
    finished.result(20)
    assert done == ["prepared", "read", "other"]


def test_a_reader_gives_the_interpreter_back_at_once() -> None:
    """A forward comes back to it hundreds of times a step, and by Python's default waits 5 ms each time."""
    before = sys.getswitchinterval()
    loaded: Future[float] = Future()
    try:
        AdapterLoader[str](lambda error: [error]).do(lambda: loaded.set_result(sys.getswitchinterval()))
        assert loaded.result(20) <= 2e-4
    finally:
        sys.setswitchinterval(before)


class Streams:
    """Stands in for ``torch.cuda``: notes what is recorded and waited for, on which stream."""

    def __init__(self) -> None:
        self.stream, self.log = "forward", []  # type: tuple[str, list[tuple[str, str, int]]]
        self._events = 0

    def current_stream(self) -> Any:
        outer, name = self, self.stream

        class Stream:
            def wait_event(self, event: Any) -> None:
                outer.log.append((name, "waits for", event.number))

        return Stream()

    def Event(self) -> Any:
        outer = self
        self._events += 1

        class Event:
            number = self._events

            def record(self, stream: Any) -> None:
                outer.log.append((outer.stream, "records", self.number))

        return Event()


def test_a_slot_is_not_overwritten_before_the_last_forward_that_reads_it() -> None:
    streams = Streams()
    guard = SlotGuard(torch.device("cpu"), streams)
    for slots in ({0, 1}, {1}, set()):
        guard.read_by_next_forward(slots)
        guard.forward_launched()
    streams.stream = "loader"
    for slot in (2, 0, 1, 1):
        guard.before_write(slot)
    assert streams.log == [
        ("forward", "records", 1),
        ("forward", "records", 2),
        ("loader", "waits for", 1),
        ("loader", "waits for", 2),
    ]


def test_a_cpu_needs_no_events() -> None:
    guard = SlotGuard(torch.device("cpu"))
    guard.read_by_next_forward([0])
    guard.forward_launched()
    guard.before_write(0)


def test_the_reader_leaves_the_forward_its_threads() -> None:
    """PyTorch's operators have a pool for each thread that calls them: the reader's would be a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        loader = AdapterLoader[int](lambda error: [error])
        loader.start("a", None, torch.get_num_threads)
        assert loader.take(FinishAdapterLoad("a"))[1].result() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
