"""Memory that the ranks of a group share, a counter for each rank, and the waiting for one another.

Work goes in steps, the same on every rank. In step k a rank writes its part of region k % 2, publishes the step, waits
until every rank has published it, and reads all parts. Two regions are enough: a rank that has published step k + 1
has read step k, and nobody begins step k + 2, which writes to the same region, before all have published step k + 1.

A counter holds the number of steps that its rank has published, modulo 2^32. Data is written with plain stores before
the counter, and read with plain loads after it: that order holds on x86-64 without fences, and on no weaker machine.
"""

import ctypes
import json
import mmap
import os
import platform
import secrets
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

# A rank that waits spins first, then sleeps. Two ranks that come up to 0.2 ms apart wait a median of 34 us without
# spinning and 23 us with this. Beside a busy process on each core a step takes 0.46 ms in the mean, and 1.7 ms (once
# 100 ms) with ranks that spin for ever and yield at each look: a rank that yields gets its core back when the other
# process's time slice ends, one that sleeps as soon as it is woken.
SPIN_SECONDS = 100e-6

# How often a sleeping rank looks whether the rank that it waits for still lives.
_CHECK_SECONDS = 0.5

_TOKEN_BYTES = 32
# One cache line each for the token and every rank's words: its counter, and whether it has left.
_LINE_BYTES = 64
_PAGE_BYTES = 4096
_MODULUS = 1 << 32
_BEHIND = 1 << 31

_SYS_FUTEX = 202  # x86-64
# Without FUTEX_PRIVATE_FLAG: the waiter is another process.
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_EVERYONE = 2**31 - 1
_waiting_syscall = ctypes.CDLL(None).syscall
# It never blocks: no need to give up the interpreter lock.
_waking_syscall = ctypes.PyDLL(None).syscall


class Store(Protocol):
    """What the ranks meet through, before they share memory (PyTorch: ``torch.distributed.Store``)."""

    def set(self, key: str, value: str, /) -> None: ...

    def multi_get(self, keys: list[str], /) -> list[bytes]: ...


class SegmentUnavailableError(Exception):
    """The ranks cannot share memory; each of them raises this with the same reason."""


class RankLostError(RuntimeError):
    """A rank did not publish a step: it died, left, or took longer than the timeout."""


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


@dataclass(frozen=True)
class Member:
    """A rank's process, as it describes itself to the others.

    Attributes:
        host: a boot of a kernel and a namespace of process ids in it: what process ids and paths in /proc mean.
        cores: those that the process may run on.
        memory: rank 0's path to the memory; the others' is empty.
        token: what the memory that is meant begins with; rank 0's.
        problem: why this process cannot share memory; None if it can.
    """

    pid: int
    host: str = ""
    cores: tuple[int, ...] = ()
    memory: str = ""
    token: str = ""
    problem: str | None = None


def map_file(path: str, num_bytes: int) -> mmap.mmap:
    """Map a file of another process's; `OSError` where it may not be opened."""
    with Path(path).open("r+b") as file:
        return mmap.mmap(file.fileno(), num_bytes)


def share_segment(
    store: Store,
    rank: int,
    size: int,
    region_bytes: int,
    map_memory: Callable[[str, int], mmap.mmap] = map_file,
    first_step: int = 0,
) -> "SharedSegment":
    """Make a segment together with the other ranks, all of which call this.

    Rank 0's memory has no name in any file system, so that it is gone when the last process is, however that ends. It
    costs no memory until it is written to.

    Args:
        store: for this group alone.
        region_bytes: of each of the two regions.
        map_memory: maps the memory at a path.
        first_step: where the counters begin; the same on every rank.

    Raises:
        SegmentUnavailableError: some rank cannot take part; on every rank, with the same reason.
    """
    num_bytes = _header_bytes(size) + 2 * region_bytes
    descriptor: int | None = None
    try:
        if rank == 0:
            descriptor = os.memfd_create("bdlora_segment")
            os.ftruncate(descriptor, num_bytes)
        member = _describe_this_process(descriptor)
        if descriptor is not None:
            os.pwrite(descriptor, bytes.fromhex(member.token), 0)
    except OSError as error:
        member = Member(os.getpid(), problem=repr(error))
    try:
        store.set(f"member{rank}", json.dumps(asdict(member)))
        members = [Member(**json.loads(text)) for text in store.multi_get([f"member{r}" for r in range(size)])]
        _raise_first([member.problem for member in members])
        if len({member.host for member in members}) > 1:
            raise SegmentUnavailableError("the ranks are on different hosts or in different containers")
        segment, problem = None, ""
        try:
            memory = map_memory(members[0].memory, num_bytes)
            if memory[:_TOKEN_BYTES].hex() != members[0].token:
                raise OSError(f"{members[0].memory} is not rank 0's memory")
            segment = SharedSegment(memory, rank, members, region_bytes, first_step)
        except OSError as error:
            problem = repr(error)
        # All have begun their counters, and nobody opens the path any more, when all have answered.
        store.set(f"mapped{rank}", problem)
        _raise_first([text.decode() for text in store.multi_get([f"mapped{r}" for r in range(size)])])
        assert segment is not None
        return segment
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _describe_this_process(descriptor: int | None) -> Member:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    pid = os.getpid()
    return Member(
        pid,
        host=f"{boot} {Path('/proc/self/ns/pid').readlink()}",
        cores=tuple(sorted(os.sched_getaffinity(0))),
        memory="" if descriptor is None else f"/proc/{pid}/fd/{descriptor}",
        token="" if descriptor is None else secrets.token_hex(_TOKEN_BYTES),
        problem=None if (machine := platform.machine()) == "x86_64" else f"the machine is {machine}, not x86_64",
    )


def _raise_first(problems: Sequence[str | None]) -> None:
    for rank, problem in enumerate(problems):
        if problem:
            raise SegmentUnavailableError(f"rank {rank}: {problem}")


def _header_bytes(size: int) -> int:
    return -(-_LINE_BYTES * (1 + size) // _PAGE_BYTES) * _PAGE_BYTES


class SharedSegment:
    """This rank's side of the shared memory.

    Attributes:
        memory: header and regions. Python keeps a descriptor of its own beside each mapping; both go with the last
            object that refers to the memory.
        region: 0 or 1, the region that the step in progress writes to.
        spins: whether a rank that waits spins: only where every rank can have a core to itself, for a rank that spins
            on the core that another one needs holds up both.
    """

    def __init__(
        self, memory: mmap.mmap, rank: int, members: Sequence[Member], region_bytes: int, first_step: int
    ) -> None:
        self.memory = memory
        self.rank = rank
        self.size = len(members)
        self.region_bytes = region_bytes
        self.region_offsets = tuple(_header_bytes(self.size) + region * region_bytes for region in range(2))
        self.spins = len({core for member in members for core in member.cores}) >= self.size
        self._pids = [member.pid for member in members]
        self._words = memoryview(memory).cast("I")
        self._own_word = self._word(rank)
        # Not all in the same order, or the ranks would all look at the same counter first.
        self._others = [(rank + i) % self.size for i in range(1, self.size)]
        self._other_words = [self._word(other) for other in self._others]
        first_address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._addresses = [ctypes.c_void_p(first_address + 4 * self._word(r)) for r in range(self.size)]
        # Converted once: half of what a call through ctypes costs is the conversion of its arguments.
        self._wake_arguments = (
            *(ctypes.c_long(_SYS_FUTEX), self._addresses[rank], ctypes.c_long(_FUTEX_WAKE)),
            *(ctypes.c_long(_EVERYONE), None, None, ctypes.c_long(0)),
        )
        self._published = first_step % _MODULUS
        self.region = self._published & 1
        self._words[self._own_word] = self._published

    @staticmethod
    def _word(rank: int) -> int:
        return _LINE_BYTES // 4 * (1 + rank)

    def publish(self) -> None:
        """Show the others what this rank has written, and begin the next step: ``region`` changes."""
        self._published = published = (self._published + 1) % _MODULUS
        self.region = published & 1
        self._words[self._own_word] = published
        # Always, though often nobody sleeps: to look whether somebody does would take a fence between the store and
        # the look, and this costs 0.7 us.
        _waking_syscall(*self._wake_arguments)

    def all_arrived(self) -> bool:
        """Whether all ranks publish, within a short time of spinning, the step that this one has published."""
        words, published = self._words, self._published
        deadline = 0.0
        for word in self._other_words:
            # A rank may be one step ahead; differences are modulo 2^32, as the counters are.
            while (words[word] - published) & _BEHIND:
                if not self.spins:
                    return False
                if not deadline:
                    deadline = time.perf_counter() + SPIN_SECONDS
                elif time.perf_counter() >= deadline:
                    return False
        return True

    def wait(self, timeout: float) -> None:
        """Sleep until all ranks have published the step that this one has published.

        Args:
            timeout: seconds.

        Raises:
            RankLostError: a rank died, left, or did not come in time; it is named.
        """
        started = checked = time.monotonic()
        for rank in self._others:
            while self._behind(rank):
                now = time.monotonic()
                if self._words[self._word(rank) + 1]:
                    self._raise_if_behind(rank, "has left the group, at its shutdown or after an error")
                if now - started >= timeout:
                    self._raise_if_behind(rank, f"has not come within {timeout:g} s")
                if now - checked >= _CHECK_SECONDS:
                    checked = now
                    if not _is_running(self._pids[rank]):
                        self._raise_if_behind(rank, "is gone")
                self._sleep(rank, min(_CHECK_SECONDS, timeout - (now - started)))

    def _behind(self, rank: int) -> int:
        return (self._words[self._word(rank)] - self._published) & _BEHIND

    def _raise_if_behind(self, rank: int, what: str) -> None:
        if self._behind(rank):  # Looked at once more: the rank may have published before that.
            raise RankLostError(f"rank {rank} (process {self._pids[rank]}) {what}")

    def _sleep(self, rank: int, seconds: float) -> None:
        """Sleep until the rank publishes, but no longer than ``seconds``; may return early."""
        seen = self._words[self._word(rank)]
        # The kernel compares again: a rank that published between this and the sleep is not slept through.
        if (seen - self._published) & _BEHIND:
            duration = _Timespec(*divmod(int(max(seconds, 0.001) * 1e9), 10**9))
            _waiting_syscall(
                *(ctypes.c_long(_SYS_FUTEX), self._addresses[rank], ctypes.c_long(_FUTEX_WAIT), ctypes.c_long(seen)),
                *(ctypes.byref(duration), None, ctypes.c_long(0)),
            )

    def leave(self) -> None:
        """Tell the others that this rank publishes nothing more, so that they need not wait for their timeouts."""
        self._words[self._own_word + 1] = 1
        _waking_syscall(*self._wake_arguments)


def _is_running(pid: int) -> bool:
    """Whether the process exists and has not ended (a process that its parent has not yet waited for has)."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    except OSError:  # A kernel or a sandbox without it: the timeout remains.
        return True
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return not poll.poll(0)
    finally:
        os.close(descriptor)
