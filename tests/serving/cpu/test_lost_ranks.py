"""Ranks of the shared-memory backend that die, stop, or cannot share memory; and what is left of them."""

import logging
import mmap
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bdlora_sglang.serving.cpu.process_group import SharedMemoryGroup
from bdlora_sglang.serving.cpu.shared_segment import map_file
from tests.serving.cpu.ranks import run_ranks, start_ranks

SLACK_SECONDS = 10


def until_a_rank_is_lost(rank: int, size: int, folder: Path) -> None:
    """Write down what the call that fails says, how long it took, and what the next one says."""
    tensor = torch.ones(16)
    dist.all_reduce(tensor)
    (folder / f"running{rank}").touch()
    try:
        while True:
            time.sleep(0.01)
            began = time.monotonic()
            dist.all_reduce(tensor)
    except dist.DistBackendError as error:
        lasted = time.monotonic() - began
        began = time.monotonic()
        with pytest.raises(dist.DistBackendError, match="cannot be used any more"):
            dist.barrier()
        again = time.monotonic() - began
        partial = folder / f"partial{rank}"
        partial.write_text(f"{lasted}\n{again}\n{error}")
        partial.rename(folder / f"error{rank}")
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def three_ranks(tmp_path: Path) -> Iterator[list[BaseProcess]]:
    ranks = start_ranks(until_a_rank_is_lost, 3, tmp_path, tmp_path, timeout=timedelta(seconds=5))
    try:
        wait_for(lambda: all((tmp_path / f"running{rank}").exists() for rank in range(3)))
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


@pytest.mark.parametrize(
    ("number", "limit", "reason"), [(signal.SIGKILL, 5, "is gone"), (signal.SIGSTOP, 5, "has not come within 5 s")]
)
def test_a_lost_rank_is_an_error_on_the_others(
    three_ranks: list[BaseProcess], tmp_path: Path, number: signal.Signals, limit: float, reason: str
) -> None:
    pid = three_ranks[1].pid
    assert pid is not None
    os.kill(pid, number)
    wait_for(lambda: all((tmp_path / f"error{rank}").exists() for rank in (0, 2)), limit + SLACK_SECONDS)
    messages = []
    for rank in (0, 2):
        lasted, again, message = (tmp_path / f"error{rank}").read_text().split("\n")
        assert float(lasted) < limit + SLACK_SECONDS / 2 and float(again) < 1
        assert message.startswith(f"bdlora::all_reduce of group 0 (default_pg), rank {rank} of 3: "), message
        messages.append(message)
    # The second to see it may instead see that the first has left.
    assert any(message.endswith(f"rank 1 (process {pid}) {reason}") for message in messages), messages


def test_nothing_has_a_name_in_a_file_system(three_ranks: list[BaseProcess]) -> None:
    """So nothing can outlive the ranks, whatever ends them; and no descriptor of rank 0's is left for others."""
    for rank in three_ranks:
        maps = Path(f"/proc/{rank.pid}/maps").read_text().splitlines()
        segments = [line.split(maxsplit=5) for line in maps if "bdlora" in line and ".so" not in line]
        assert [(fields[1], fields[5]) for fields in segments] == [("rw-s", "/memfd:bdlora_segment (deleted)")]
        links = [str(link.readlink()) for link in Path(f"/proc/{rank.pid}/fd").iterdir() if link.is_symlink()]
        assert links.count("/memfd:bdlora_segment (deleted)") == 1
        assert not any("/dev/shm" in link for link in links)


def refuse_other_processes(path: str, num_bytes: int) -> mmap.mmap:
    if not path.startswith(f"/proc/{os.getpid()}/"):
        raise PermissionError("not allowed here")
    return map_file(path, num_bytes)


def over_gloo(rank: int, size: int) -> None:
    assert not isinstance(dist.group.WORLD, SharedMemoryGroup)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("bdlora_sglang.serving.cpu.process_group").addHandler(handler)
    group = dist.new_group(list(range(size)), backend="tested")
    assert not isinstance(group, SharedMemoryGroup)
    assert len(messages) == (1 if rank == 0 else 0)
    if rank == 0:
        assert messages[0].endswith("rank 1: PermissionError('not allowed here')")
    tensor = torch.full((3,), rank + 1)
    dist.all_reduce(tensor, group=group)
    gathered = torch.empty(size, dtype=torch.int64)
    dist.all_gather_into_tensor(gathered, torch.tensor([rank]), group=group)
    assert tensor.tolist() == [size * (size + 1) // 2] * 3 and gathered.tolist() == list(range(size))


def test_gloo_where_a_rank_cannot_map_the_memory(tmp_path: Path) -> None:
    run_ranks(over_gloo, 3, tmp_path, map_memory=refuse_other_processes)


def alone(rank: int, size: int) -> None:
    tensor = torch.ones(2)
    dist.all_reduce(tensor)
    assert tensor.tolist() == [1, 1] and not isinstance(dist.group.WORLD, SharedMemoryGroup)


def test_a_single_rank_shares_nothing(tmp_path: Path) -> None:
    run_ranks(alone, 1, tmp_path)
