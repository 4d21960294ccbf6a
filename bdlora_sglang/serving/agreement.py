"""Ranks load an adapter together or not at all.

Each rank reads its own part, so one rank alone can fail: its part is corrupt, its node lacks the file, its memory is
full. SGLang's scheduler answers with the first rank's result only, and a rank without the adapter would die at the
first request for it.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from bdlora_sglang.errors import BDLoRAError

# Hands each rank's error (None: no error) to all ranks, in rank order.
AllGather = Callable[[str | None], Sequence[str | None]]

T = TypeVar("T")


def read_together(read: Callable[[], T], all_gather: AllGather) -> T:
    """What ``read`` gives on this rank, when it succeeds on every rank.

    Raises:
        BDLoRAError: on every rank alike, with the reasons of those whose ``read`` raised.
    """
    result: T | None = None
    error: str | None = None
    try:
        result = read()
    # Whatever went wrong on this rank, memory included: it must still take part, or the others wait for it for ever.
    except Exception as exception:
        error = str(exception) or repr(exception)
    errors = all_gather(error)
    if any(errors):
        raise BDLoRAError(_describe(errors))
    assert result is not None
    return result


def _describe(errors: Sequence[str | None]) -> str:
    """The one reason when all ranks agree on it, else each reason with its rank."""
    if len(set(errors)) == 1:
        return errors[0] or ""
    return "; ".join(f"TP rank {rank}: {error}" for rank, error in enumerate(errors) if error)
