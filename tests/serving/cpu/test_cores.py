"""Cores and threads: how they are shared out, what the user's own settings change, and what running ranks have."""

import os
import re
from pathlib import Path

import psutil
import pytest

from bdlora_sglang.serving.cpu.cores import BINDING, RankCores, cpu_quota, physical_cores, rank_cores, share_out
from tests.serving.server import running_server
from tests.serving.zoo import Zoo


@pytest.mark.parametrize(
    ("cores", "ranks", "expected"),
    [
        ([0, 1], 1, [[0, 1]]),
        ([0, 1], 2, [[0], [1]]),
        ([0, 1], 3, [[0], [1], [0]]),
        ([0, 1], 4, [[0], [1], [0], [1]]),
        ([0, 1, 2, 3, 4], 2, [[0, 1], [2, 3]]),
        ([4, 6, 8, 10], 1, [[4, 6, 8]]),  # four and more leave one for the server's other processes
        (list(range(8)), 2, [[0, 1, 2], [3, 4, 5]]),
        (list(range(9)), 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ([7], 2, [[7], [7]]),
    ],
)
def test_cores_are_shared_out(cores: list[int], ranks: int, expected: list[list[int]]) -> None:
    assert share_out(cores, ranks) == expected


def test_one_processor_of_each_core(tmp_path: Path) -> None:
    """Two sockets of two cores with two hyperthreads each, numbered as Linux does: siblings are four apart."""
    for cpu in range(8):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(str(cpu % 2))
        (topology / "core_id").write_text(str(cpu // 2 % 2))
    assert physical_cores(range(8), tmp_path) == [0, 2, 1, 3]
    assert physical_cores([3, 4, 5, 7], tmp_path) == [4, 5, 3]  # 3 and 7 are siblings; 0, 1 and 2 are not ours
    assert physical_cores([9, 11], tmp_path) == [9, 11]  # no topology is known


@pytest.mark.parametrize(
    ("environment", "quota", "expected"),
    [
        ({BINDING: "0-2,5|6-8"}, None, RankCores((0, 1, 2, 5), 4)),
        ({BINDING: "0-2,5|6-8", "OMP_NUM_THREADS": "2"}, None, RankCores((0, 1, 2, 5), 2)),
        ({BINDING: "0-2,5|6-8", "OMP_NUM_THREADS": "5,1"}, None, RankCores((), 5)),
        ({BINDING: "0-2,5|6-8", "OMP_PROC_BIND": "close"}, None, RankCores((), 4)),
        ({BINDING: "0-2,5|6-8"}, 5.5, RankCores((0, 1, 2, 5), 2)),
        ({BINDING: "0-2,5|6-8"}, 0.5, RankCores((0, 1, 2, 5), 1)),
        ({BINDING: "0-2,5|6-8", "OMP_NUM_THREADS": "3"}, 2.0, RankCores((0, 1, 2, 5), 3)),
        ({}, None, RankCores((), 16)),
    ],
)
def test_what_the_user_has_set_stays(environment: dict[str, str], quota: float | None, expected: RankCores) -> None:
    assert rank_cores(0, environment, range(16), quota) == expected


def test_the_binding_of_another_rank() -> None:
    assert rank_cores(1, {BINDING: "0|1"}, [0, 1]) == RankCores((1,), 1)
    assert str(RankCores((0, 1, 2, 5), 4)) == "cores 0-2,5, 4 threads"
    assert str(RankCores((), 1)) == "any core, 1 thread"


def test_quotas_of_control_groups(tmp_path: Path) -> None:
    """The smallest on the way up counts, in both versions of cgroups."""
    own, groups = tmp_path / "self", tmp_path / "cgroup"
    (groups / "a" / "b").mkdir(parents=True)
    own.write_text("0::/a/b\n")
    assert cpu_quota(groups, own) is None
    (groups / "a" / "b" / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(groups, own) is None
    (groups / "a" / "cpu.max").write_text("150000 100000\n")
    (groups / "cpu.max").write_text("400000 100000\n")
    assert cpu_quota(groups, own) == 1.5
    old = groups / "cpu,cpuacct" / "pod"
    old.mkdir(parents=True)
    own.write_text("4:memory:/pod\n3:cpu,cpuacct:/pod\n")
    (old / "cpu.cfs_quota_us").write_text("-1")
    (groups / "cpu.max").unlink()
    assert cpu_quota(groups, own) is None
    (old / "cpu.cfs_quota_us").write_text("50000")
    (old / "cpu.cfs_period_us").write_text("20000")
    assert cpu_quota(groups, own) == 2.5
    assert cpu_quota(groups, tmp_path / "nothing") is None


def _cores_of(process: psutil.Process) -> set[frozenset[int]]:
    """The affinities of all of its threads."""
    return {frozenset(os.sched_getaffinity(thread.id)) for thread in process.threads()}


@pytest.mark.parametrize(
    "hand_set",
    [pytest.param(False, id="default"), pytest.param(True, id="OMP_NUM_THREADS", marks=pytest.mark.full)],
)
def test_ranks_of_a_running_server(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hand_set: bool) -> None:
    """TP 3: every thread of a rank is on the rank's cores, and the log says so. (TP 1, 2 and 4 are in test_engine.py.)

    With more threads than a share has cores, set by hand, ranks are not bound.
    """
    monkeypatch.delenv(BINDING, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    allowed = os.sched_getaffinity(0)
    shares = share_out(physical_cores(allowed), 3)
    expected = [RankCores(tuple(share), len(share)) for share in shares]
    if hand_set:
        monkeypatch.setenv("OMP_NUM_THREADS", str(len(allowed) + 1))
        expected = [RankCores((), len(allowed) + 1)] * 3
    with running_server(zoo.model("llama"), tmp_path / "log", "--tp", 3) as server:
        log = server.log.read_text()
        for rank, own in enumerate(expected):
            assert re.search(rf"TP{rank}\] This rank runs on {re.escape(str(own))}\.", log), log
        children = psutil.Process(server.pid).children(recursive=True)
        ranks = sorted((c for c in children if "scheduler_TP" in c.cmdline()[0]), key=lambda c: c.cmdline()[0])
        assert [_cores_of(rank) for rank in ranks] == [{frozenset(own.cores or allowed)} for own in expected]
        others = frozenset(allowed - {core for own in expected for core in own.cores}) or frozenset(allowed)
        detokenizer = next(c for c in children if "detokenizer" in c.cmdline()[0])
        assert _cores_of(detokenizer) == _cores_of(psutil.Process(server.pid)) == {others}
