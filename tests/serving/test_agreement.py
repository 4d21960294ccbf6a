"""Ranks read an adapter together or not at all, whatever goes wrong on one of them."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.serving.agreement import read_together

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


def run(failures: dict[int, Exception]) -> list[str]:
    """What each rank read, or the error it got, when reading fails as ``failures`` says."""
    ranks = Ranks()

    def rank_reads(rank: int) -> str:
        def read() -> str:
            if rank in failures:
                raise failures[rank]
            return f"part {rank}"

        try:
            return read_together(read, ranks.all_gather(rank))
        except BDLoRAError as error:
            return f"refused: {error}"

    with ThreadPoolExecutor(RANKS) as threads:
        return list(threads.map(rank_reads, range(RANKS)))


def test_all_succeed() -> None:
    assert run({}) == ["part 0", "part 1", "part 2"]


@pytest.mark.parametrize(
    ("failures", "message"),
    [
        ({1: MemoryError("cannot allocate 8 GiB")}, "TP rank 1: cannot allocate 8 GiB"),
        ({0: MemoryError()}, "TP rank 0: MemoryError()"),
        ({2: BDLoRAError("adapter.safetensors: truncated")}, "TP rank 2: adapter.safetensors: truncated"),
        ({0: BDLoRAError("a"), 2: OSError("b")}, "TP rank 0: a; TP rank 2: b"),
        (dict.fromkeys(range(RANKS), BDLoRAError("no such file")), "no such file"),
    ],
    ids=["no memory", "no message", "refused", "two ranks", "all ranks"],
)
def test_one_failure_is_everyones(failures: dict[int, Exception], message: str) -> None:
    assert run(failures) == [f"refused: {message}"] * RANKS
