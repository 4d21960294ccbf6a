"""The shared-memory backend on 2 to 8 ranks, against sums computed beside it."""

import mmap
import random
import re
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bdlora_perf.collectives.count import Collective, count_collectives
from bdlora_sglang.serving.cpu.process_group import BACKEND, SharedMemoryGroup, register_backend
from bdlora_sglang.serving.cpu.shared_collectives import SharedCollectives
from bdlora_sglang.serving.cpu.shared_segment import Member, SharedSegment, share_segment
from tests.serving.cpu.ranks import run_ranks

# Small, so that small tensors meet every limit.
LIMITS = {"region_bytes": 1 << 14, "one_phase_bytes": 1 << 12}
WRAP = 2**32
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.float64, torch.int32, torch.uint8)


def data(rank: int, elements: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """What a rank puts in; sums of floats of mixed magnitudes show another order of adding."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if not dtype.is_floating_point:
        return torch.randint(0, 100, (elements,), generator=generator).to(dtype)
    scale = 10 ** torch.empty(elements, dtype=torch.float64).uniform_(-3, 3, generator=generator)
    values = torch.randn(elements, dtype=torch.float64, generator=generator) * scale
    # The first two ranks' cancel out; another order would lose the third's, even in float32.
    values[::5] = {0: 3e4, 1: -3e4}.get(rank, 1e-3)
    return values.to(dtype)


def expected_sum(size: int, elements: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """In the order of the ranks, 16-bit types in float32 and rounded once."""
    inputs = [data(rank, elements, dtype, seed) for rank in range(size)]
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = inputs[0].to(wide)
    for tensor in inputs[1:]:
        total = total + tensor.to(wide)
    exact = sum(tensor.double() for tensor in inputs)
    if dtype.is_floating_point:
        # The oracle's own check: no more than each addition's rounding, and the last one's to the dtype.
        bound = size * torch.finfo(wide).eps * sum(tensor.double().abs() for tensor in inputs)
        assert bool(((total.double() - exact).abs() <= bound).all())
    return total.to(dtype)


def element_counts(size: int, dtype: torch.dtype) -> Iterator[int]:
    """Nothing, one, and around each limit: one phase or two, one step or several, shares that do not divide."""
    yield from (0, 1, size - 1, size + 1)
    for limit in LIMITS.values():
        elements = limit // (size * dtype.itemsize)
        yield from (elements - 1, elements, elements + 1)
    yield 3 * elements
    yield 3 * elements + 7


def reduces(rank: int, size: int) -> None:
    for dtype in DTYPES:
        for seed, elements in enumerate(element_counts(size, dtype)):
            own = data(rank, elements, dtype, seed)
            expected = expected_sum(size, elements, dtype, seed)
            tensor = own.clone()
            dist.all_reduce(tensor)
            assert torch.equal(tensor, expected), (dtype, elements)
            # Every second element of every second row.
            strided = torch.zeros(2 * 2, 2 * elements, dtype=dtype)[::2, ::2]
            strided.copy_(own)
            dist.all_reduce(strided)
            assert torch.equal(strided, expected_sum(size, elements, dtype, seed).expand(2, -1)), (dtype, elements)
            for op, combine in ((dist.ReduceOp.MAX, torch.maximum), (dist.ReduceOp.MIN, torch.minimum)):
                tensor = own.clone()
                dist.all_reduce(tensor, op=op)
                expected = data(0, elements, dtype, seed)
                for other in range(1, size):
                    expected = combine(expected, data(other, elements, dtype, seed))
                assert torch.equal(tensor, expected), (dtype, elements, op)


def gathers(rank: int, size: int) -> None:
    for dtype in (*DTYPES, torch.bool):
        for seed, elements in enumerate(element_counts(size, dtype)):
            own = data(rank, elements, dtype, seed)
            expected = torch.stack([data(r, elements, dtype, seed) for r in range(size)])
            flat = torch.empty(size * elements, dtype=dtype)
            dist.all_gather_into_tensor(flat, own)
            assert torch.equal(flat.view(size, elements), expected), (dtype, elements)
            stacked = torch.empty(size, elements, 2, dtype=dtype)[..., 1]
            dist.all_gather_into_tensor(stacked, own)
            assert torch.equal(stacked, expected), (dtype, elements)
            listed = list(torch.empty(elements, size, dtype=dtype).unbind(1))
            dist.all_gather(listed, own.repeat_interleave(2)[::2])
            assert torch.equal(torch.stack(listed), expected), (dtype, elements)
            root = seed % size
            for sent in (own.clone(), torch.stack([own, own], dim=1)[:, 1]):
                dist.broadcast(sent, src=root)
                assert torch.equal(sent, expected[root]), (dtype, elements)
        dist.barrier()
    matrix = torch.full((4, 3), rank)
    result = torch.empty(4 * size, 3, dtype=torch.int64)
    dist.all_gather_into_tensor(result, matrix)
    assert torch.equal(result, torch.arange(size).repeat_interleave(4)[:, None].expand(-1, 3))


def other_uses(rank: int, size: int) -> None:
    """Autograd and inference tensors, handles, a group of fewer ranks, and what gloo does."""
    group = dist.group.WORLD
    assert isinstance(group, SharedMemoryGroup)
    assert (group.rank(), group.size(), group.name(), dist.get_backend()) == (rank, size, "bdlora_shm", "tested")
    triangle = size * (size + 1) // 2
    parameter = torch.nn.Parameter(torch.full((3,), rank + 1.0))
    dist.all_reduce(parameter)
    assert parameter.tolist() == [triangle] * 3
    assert parameter.grad_fn is None
    with torch.inference_mode():
        inference = torch.full((), rank + 1.0)
        dist.all_reduce(inference)
    dist.all_reduce(inference)
    assert inference.item() == triangle * size
    tensor = torch.full((2,), rank + 1)
    work = dist.all_reduce(tensor, async_op=True)
    assert work is not None and work.wait() and work.is_completed()
    assert work.get_future().wait()[0] is tensor
    assert tensor.tolist() == [triangle] * 2
    assert group.allreduce(torch.ones(1)).wait() and group.broadcast(torch.ones(1), 0).wait() and group.barrier().wait()

    for product in (torch.full((2,), 2.0), torch.full((2,), 2)):
        dist.all_reduce(product, op=dist.ReduceOp.PRODUCT)
        assert product.tolist() == [2**size] * 2
    complex_ = torch.full((2,), 1j)
    dist.all_reduce(complex_)
    assert complex_.tolist() == [size * 1j] * 2
    either = torch.tensor([rank == 0])
    dist.all_reduce(either, op=dist.ReduceOp.MAX)
    assert either.item()
    scattered = torch.empty(2)
    dist.reduce_scatter_tensor(scattered, torch.arange(2.0 * size))
    assert scattered.tolist() == [size * 2 * rank, size * (2 * rank + 1)]
    exchanged = torch.empty(size)
    dist.all_to_all_single(exchanged, torch.full((size,), float(rank)))
    assert exchanged.tolist() == list(range(size))
    reduced = torch.full((2,), float(rank))
    dist.reduce(reduced, 0)
    assert rank or reduced.tolist() == [triangle - size] * 2
    gathered = [torch.empty(1) for _ in range(size)]
    dist.gather(torch.full((1,), float(rank)), gathered if rank == 0 else None)
    assert rank or [one.item() for one in gathered] == list(range(size))
    dist.scatter(scattered, [torch.full((2,), float(r)) for r in range(size)] if rank == 0 else None)
    assert scattered.tolist() == [rank] * 2
    objects: list[object] = [None] * size
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": r} for r in range(size)]
    if rank < 2:
        passed = torch.full((1,), rank)
        dist.send(passed, 1) if rank == 0 else dist.recv(passed, 0)
        assert passed.item() == 0
    first_two = dist.new_group([0, 1], backend="tested", timeout=timedelta(seconds=60))
    if rank < 2:
        ones = torch.ones(1)
        dist.all_reduce(ones, group=first_two)
        assert ones.item() == 2
        dist.destroy_process_group(first_two)
    dist.set_timeout(timedelta(seconds=7))
    assert group._seconds_of(dist.AllreduceOptions().timeout) == 7


def all_of_it(rank: int, size: int) -> None:
    reduces(rank, size)
    gathers(rank, size)
    other_uses(rank, size)


def test_no_operation_reaches_gloo_with_the_interpreters_lock_held() -> None:
    """What Python does not define, PyTorch does with the lock held: every few thousand operations ranks hung."""
    returns_work = re.compile(r"-> \S*Work\b")
    operations = {
        name for name in dir(dist.ProcessGroup) if returns_work.search(getattr(dist.ProcessGroup, name).__doc__ or "")
    }
    operations -= {"_end_coalescing", "reconfigure"}  # of other backends
    python = SharedMemoryGroup.__mro__[: SharedMemoryGroup.__mro__.index(dist.ProcessGroup)]
    assert len(operations) > 20
    assert sorted(name for name in operations if not any(name in vars(owner) for owner in python)) == []


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_collectives(size: int, tmp_path: Path) -> None:
    """At every size around a limit; the counters wrap around in the midst of it."""
    run_ranks(all_of_it, size, tmp_path, first_step=WRAP - 99, **LIMITS)


def real_limits(rank: int, size: int) -> None:
    for seed, elements in enumerate((2**15 - 1, 2**15 + 1, 2**20 + 3, 2**22 + 1)):
        tensor = data(rank, elements, torch.float32, seed)
        dist.all_reduce(tensor)
        assert torch.equal(tensor, expected_sum(size, elements, torch.float32, seed)), elements


@pytest.mark.parametrize("size", [2, 3])
def test_large_tensors(size: int, tmp_path: Path) -> None:
    """With the limits that are used: more than a region holds."""
    run_ranks(real_limits, size, tmp_path)


def random_sequence(rank: int, size: int, calls: int, seed: int) -> None:
    """Operations and sizes from a seed, the same on every rank; every element of every result is looked at."""
    rng = random.Random(seed)
    with torch.inference_mode():
        for call in range(calls):
            elements = rng.choice((1, 3, 16, 64, 256, 256, 1024, 5000) if rng.random() < 0.05 else (1, 2, 5, 17, 64))
            tensor = torch.full((elements,), rank + call, dtype=torch.int64)
            operation = rng.random()
            if operation < 0.6:
                dist.all_reduce(tensor)
                right = bool((tensor == size * call + size * (size - 1) // 2).all())
            elif operation < 0.8:
                gathered = torch.empty(size, elements, dtype=torch.int64)
                dist.all_gather_into_tensor(gathered, tensor)
                right = bool((gathered == torch.arange(call, call + size)[:, None]).all())
            elif operation < 0.97:
                root = rng.randrange(size)
                dist.broadcast(tensor, root)
                right = bool((tensor == root + call).all())
            else:
                dist.barrier()
                right = True
            assert right, (call, elements, operation)


@pytest.mark.parametrize(("size", "calls"), [(2, 100_000), (3, 5_000), (4, 5_000)])
def test_many_calls_under_load(size: int, calls: int, tmp_path: Path) -> None:
    """Beside two processes that take the cores away again and again."""
    run_ranks(random_sequence, size, tmp_path, calls, size, busy=2, first_step=WRAP - calls // 2, **LIMITS)


@pytest.mark.full
@pytest.mark.parametrize(("size", "calls"), [(2, 2_000_000), (3, 100_000), (4, 100_000), (8, 20_000)])
def test_millions_of_calls(size: int, calls: int, tmp_path: Path) -> None:
    run_ranks(random_sequence, size, tmp_path, calls, size, busy=0 if size == 2 else 1, **LIMITS)


def slow_readers(rank: int, size: int, folder: Path) -> None:
    segment = share_segment(dist.FileStore(str(folder / "second"), size), rank, size, 1 << 12)
    rng = random.Random(rank)

    def exchange() -> None:
        segment.publish()
        if not segment.all_arrived():
            segment.wait(60)
        # The others run on, as far as they can.
        time.sleep(rng.choice((0, 0, 0.002)))

    collectives = SharedCollectives(segment, exchange, 1 << 11)
    for call in range(150):
        for elements in (2, 256):
            tensor = torch.full((elements,), rank + call)
            collectives.all_reduce(tensor, torch.add)
            assert bool((tensor == size * call + size * (size - 1) // 2).all()), (call, elements)


@pytest.mark.parametrize("size", [2, 4])
def test_nobody_overwrites_what_another_rank_still_reads(size: int, tmp_path: Path) -> None:
    run_ranks(slow_readers, size, tmp_path, tmp_path)


def test_gloo_stays_the_default_of_cpu_tensors() -> None:
    register_backend()
    register_backend()
    assert dist.Backend.default_device_backend_map["cpu"] == "gloo"
    assert dist.Backend.backend_list.count(BACKEND) == 1


def profiled(rank: int, size: int, folder: Path) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        dist.all_reduce(torch.ones(3, 5))
        dist.all_gather_into_tensor(torch.empty(size * 2, 7), torch.ones(2, 7))
        dist.all_gather([torch.empty(4) for _ in range(size)], torch.ones(4))
        dist.all_reduce(torch.ones(6), op=dist.ReduceOp.PRODUCT)
        dist.barrier()
    profile.export_chrome_trace(str(folder / f"x-TP-{rank}.trace.json"))


def test_collectives_are_events_of_a_trace(tmp_path: Path) -> None:
    """Those over gloo as well, and each just once."""
    run_ranks(profiled, 2, tmp_path, tmp_path)
    expected = [("all_reduce", (3, 5)), ("all_gather", (2, 7)), ("all_gather", (4,)), ("all_reduce", (6,))]
    once = {Collective(operation, shape): 1 for operation, shape in expected}
    assert count_collectives(tmp_path) == {0: once, 1: once}


def test_ranks_spin_only_on_cores_of_their_own() -> None:
    memory = mmap.mmap(-1, 1 << 14)

    def spins(*cores: tuple[int, ...]) -> bool:
        return SharedSegment(memory, 0, [Member(1, cores=own) for own in cores], 1 << 12, 0).spins

    assert spins((0,), (1,)) and spins((0, 1), (0, 1)) and not spins((0,), (0,)) and not spins((0, 1), (0,), (1,))
