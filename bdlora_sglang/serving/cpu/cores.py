"""Which cores and threads each rank gets on the CPU.

The shares travel to the ranks in SGLang's own variable, ``SGLANG_CPU_OMP_THREADS_BIND`` (cores of rank 0 | cores of
rank 1 | ...), which SGLang itself only heeds with its own CPU kernels. What the user has set stays: that variable,
``OMP_NUM_THREADS``, ``OMP_PROC_BIND`` and the like, the cores that ``taskset`` or a cgroup leaves, a cgroup's quota.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

BINDING = "SGLANG_CPU_OMP_THREADS_BIND"

# With any of these the OpenMP runtime places threads itself.
_PLACED_BY_USER = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
# A rank of so many cores gives one away for the server's other processes: one late thread delays all of its threads.
_ENOUGH_TO_GIVE = 4

# The binding that we chose. In the environment like the binding itself, so that engines after this one and processes
# that inherit both can tell it from the user's.
_CHOSEN = "BDLORA_CHOSEN_BINDING"


@dataclass(frozen=True)
class RankCores:
    """What a rank runs on; ``cores`` is empty where it is not bound."""

    cores: tuple[int, ...]
    threads: int

    def __str__(self) -> str:
        place = f"cores {_ranges(self.cores)}" if self.cores else "any core"
        return f"{place}, {self.threads} thread{'s' if self.threads > 1 else ''}"


def choose_binding(num_ranks: int) -> None:
    """Share out this process's cores over the ranks that it will start; the user's own `BINDING` stays."""
    # Ours was for an engine before this one, which may have had other ranks.
    if not os.environ.get(BINDING) or os.environ[BINDING] == os.environ.get(_CHOSEN):
        shares = share_out(physical_cores(os.sched_getaffinity(0)), num_ranks)
        os.environ[BINDING] = os.environ[_CHOSEN] = "|".join(",".join(map(str, share)) for share in shares)


def share_out(cores: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Neighbouring cores for each rank, all the same number; where there are fewer cores than ranks, one in turn."""
    share = max(1, len(cores) // num_ranks)
    if share >= _ENOUGH_TO_GIVE and share * num_ranks == len(cores):
        share -= 1
    return [[cores[(rank * share + i) % len(cores)] for i in range(share)] for rank in range(num_ranks)]


def physical_cores(allowed: Iterable[int], topology: Path = Path("/sys/devices/system/cpu")) -> list[int]:
    """One of the allowed logical processors of each core, neighbours side by side: by socket, then by core."""
    first: dict[tuple[int, int], int] = {}
    for cpu in sorted(allowed):
        try:
            folder = topology / f"cpu{cpu}" / "topology"
            place = tuple(int((folder / name).read_text()) for name in ("physical_package_id", "core_id"))
        except (OSError, ValueError):
            place = (0, cpu)
        first.setdefault((place[0], place[1]), cpu)
    return [first[place] for place in sorted(first)]


def rank_cores(
    index: int, environment: Mapping[str, str], allowed: Iterable[int], quota: float | None = None
) -> RankCores:
    """What the rank at ``index`` of `BINDING` gets.

    Args:
        environment: of the process.
        allowed: its cores, for a rank that is not bound.
        quota: processors' worth of time that all ranks have together (a cgroup's), None for no limit.
    """
    groups = environment[BINDING].split("|") if environment.get(BINDING) else []
    cores = _parse(groups[index]) if index < len(groups) else ()
    threads = len(cores or tuple(allowed))
    if quota is not None:
        threads = max(1, min(threads, int(quota / max(1, len(groups)))))
    given = environment.get("OMP_NUM_THREADS", "").partition(",")[0]
    if given.isdigit() and int(given) > 0:
        threads = int(given)
    # More threads than the share has cores: the user knows better where they run.
    bound = cores and threads <= len(cores) and not any(environment.get(name) for name in _PLACED_BY_USER)
    return RankCores(cores if bound else (), threads)


def bind_rank(index: int) -> RankCores:
    """Give this process its cores and threads; to be called before anything runs in parallel."""
    own = rank_cores(index, os.environ, os.sched_getaffinity(0), cpu_quota())
    if own.cores:
        _move_process(own.cores)
    torch.set_num_threads(own.threads)
    return own


def leave_ranks_alone() -> None:
    """Move this process and what it will start to cores without a rank, where ranks are bound and leave some."""
    allowed = os.sched_getaffinity(0)
    if rank_cores(0, os.environ, allowed, cpu_quota()).cores:
        taken = {core for group in os.environ[BINDING].split("|") for core in _parse(group)}
        _move_process(sorted(allowed - taken) or allowed)


def cpu_quota(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Processors' worth of time that this process's cgroups allow (v2 ``cpu.max``, v1 ``cpu.cfs_quota_us``)."""
    quotas: list[float] = []
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root = groups / controllers if "cpu" in controllers.split(",") else groups
            for folder in (root / path.lstrip("/"), *(root / path.lstrip("/")).parents):
                quotas += _quota_of(folder)
                if folder == groups:
                    break
    return min(quotas, default=None)


def _quota_of(folder: Path) -> list[float]:
    with suppress(OSError, ValueError):
        limit, period = (folder / "cpu.max").read_text().split()
        return [int(limit) / int(period)] if limit != "max" else []
    with suppress(OSError, ValueError):
        limit_us = int((folder / "cpu.cfs_quota_us").read_text())
        return [limit_us / int((folder / "cpu.cfs_period_us").read_text())] if limit_us > 0 else []
    return []


def _move_process(cores: Iterable[int]) -> None:
    """All threads: some were started by imports, and new ones inherit from the thread that starts them."""
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cores)


def _parse(group: str) -> tuple[int, ...]:
    """Cores of ``0-3,8``."""
    cores: list[int] = []
    for part in filter(None, group.split(",")):
        first, _, last = part.partition("-")
        cores += range(int(first), int(last or first) + 1)
    return tuple(cores)


def _ranges(cores: Sequence[int]) -> str:
    """``0-3,8`` of cores."""
    ranges: list[list[int]] = []
    for core in cores:
        if ranges and core == ranges[-1][-1] + 1:
            ranges[-1].append(core)
        else:
            ranges.append([core])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in ranges)
