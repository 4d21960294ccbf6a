"""Ranks load together or not at all, whatever goes wrong on one of them."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from sglang.srt.managers.io_struct import LoRAUpdateOutput

from bdlora_sglang.serving.agreement import load_together

RANKS = 3


class Ranks:
    """An all-gather between threads, one thread a rank."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(RANKS, timeout=20)
        self._errors: list[str | None] = [None] * RANKS

    def all_gather(self, rank: int) -> Callable[[str | None], Sequence[str | None]]:
        def gather(error: str | None) -> Sequence[str | None]:
            self._errors[rank] = error
            self._barrier.wait()
            return list(self._errors)

        return gather


def run(failures: dict[int, Exception | str]) -> tuple[list[LoRAUpdateOutput], list[set[str]]]:
    """Each rank's result, and the adapters that it holds afterwards, when loading fails as ``failures`` says."""
    ranks = Ranks()
    held: list[set[str]] = [{"old"} for _ in range(RANKS)]

    def rank_loads(rank: int) -> LoRAUpdateOutput:
        def result(success: bool, message: str = "") -> LoRAUpdateOutput:
            adapters = {name: name for name in held[rank]}
            return LoRAUpdateOutput(success=success, error_message=message, loaded_adapters=adapters)

        def load() -> LoRAUpdateOutput:
            failure = failures.get(rank)
            if isinstance(failure, Exception):
                raise failure
            if failure is not None:
                return result(False, failure)
            held[rank].add("new")
            return result(True)

        def unload() -> LoRAUpdateOutput:
            held[rank].discard("new")
            return result(True)

        return load_together(load, unload, ranks.all_gather(rank))

    with ThreadPoolExecutor(RANKS) as threads:
        return list(threads.map(rank_loads, range(RANKS))), held


def test_all_succeed() -> None:
    results, held = run({})
    assert all(result.success for result in results)
    assert held == [{"old", "new"}] * RANKS


@pytest.mark.parametrize(
    ("failures", "message"),
    [
        ({1: MemoryError("cannot allocate 8 GiB")}, "TP rank 1: cannot allocate 8 GiB"),
        ({0: MemoryError()}, "TP rank 0: MemoryError()"),
        ({2: "adapter.safetensors: truncated"}, "TP rank 2: adapter.safetensors: truncated"),
        ({0: "a", 2: OSError("b")}, "TP rank 0: a; TP rank 2: b"),
        ({0: "no such file", 1: "no such file", 2: "no such file"}, "no such file"),
    ],
    ids=["no memory", "no message", "refused", "two ranks", "all ranks"],
)
def test_one_failure_is_everyones(failures: dict[int, Exception | str], message: str) -> None:
    results, held = run(failures)
    for result in results:
        assert not result.success
        assert result.error_message == message
    assert held == [{"old"}] * RANKS
    # Only the new adapter is taken back, and SGLang's front end is told what is left.
    for rank, result in enumerate(results):
        if result.loaded_adapters is not None:
            assert set(result.loaded_adapters) == {"old"}, rank
