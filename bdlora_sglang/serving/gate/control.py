"""Requests that steer the server: profiles, sessions, memory. Their numbers and words, before they reach the ranks."""

from http import HTTPStatus
from typing import Any

import msgspec
from sglang.srt.constants import GPU_MEMORY_ALL_TYPES
from sglang.srt.managers.io_struct import (
    FlushCacheReqInput,
    OpenSessionReqInput,
    ProfileReq,
    ReleaseMemoryOccupationReqInput,
    ResumeMemoryOccupationReqInput,
    SlowDownReqInput,
    msgpack_decode,
    msgpack_encode,
)

from bdlora_sglang.serving.gate.bounds import Range
from bdlora_sglang.serving.gate.errors import RequestError

_INT32_MAX = 2**31 - 1
_RANGES: dict[type, dict[str, Range]] = {
    # Slept before each forward, by all ranks.
    SlowDownReqInput: {"forward_sleep_time": Range(0, 60)},
    FlushCacheReqInput: {"timeout_s": Range(0, 3600)},
    OpenSessionReqInput: {"capacity_of_str_len": Range(0, _INT32_MAX), "timeout": Range(0, _INT32_MAX)},
    ProfileReq: {"start_step": Range(0, _INT32_MAX), "num_steps": Range(1, _INT32_MAX)},
}
_WORDS: dict[type, dict[str, tuple[str, ...]]] = {
    ProfileReq: {"activities": ("CPU", "GPU", "MEM", "RPD", "CUDA_PROFILER")},
    ReleaseMemoryOccupationReqInput: {"tags": tuple(GPU_MEMORY_ALL_TYPES)},
    ResumeMemoryOccupationReqInput: {"tags": tuple(GPU_MEMORY_ALL_TYPES)},
}


def check_control(request: Any) -> None:
    """Raise `RequestError` for a number out of range, an unknown word, or what the scheduler could not read."""
    for name, allowed in _RANGES.get(type(request), {}).items():
        value = getattr(request, name)
        if value is not None:
            allowed.check(name, value)
    for name, words in _WORDS.get(type(request), {}).items():
        for word in getattr(request, name) or ():
            if word not in words:
                raise RequestError(name, word, f"some of: {', '.join(words)}")
    try:
        msgpack_decode(msgpack_encode(request))
    except (msgspec.ValidationError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise RequestError(type(request).__name__, str(error), "values that SGLang's types allow") from None


class ReleasedMemory:
    """Which kinds of memory (SGLang's tags) were released. While any is, the model cannot run."""

    def __init__(self) -> None:
        self._tags: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._tags)

    def release(self, tags: list[str] | None) -> set[str]:
        """Note ``tags``, by default all, as released; raises `RequestError` (409) when some are."""
        wanted = set(tags or GPU_MEMORY_ALL_TYPES)
        if again := wanted & self._tags:
            raise RequestError("tags", sorted(again), "memory that is not released yet", HTTPStatus.CONFLICT)
        self._tags |= wanted
        return wanted

    def resume(self, tags: list[str] | None) -> set[str]:
        """The tags to resume, by default all; raises `RequestError` (409) when some were not released."""
        wanted = set(tags or GPU_MEMORY_ALL_TYPES)
        if missing := wanted - self._tags:
            raise RequestError("tags", sorted(missing), "memory that was released", HTTPStatus.CONFLICT)
        return wanted

    def resumed(self, tags: set[str]) -> None:
        self._tags -= tags
