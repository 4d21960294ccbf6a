"""A backend of ``torch.distributed`` for ranks on one host's CPU: collectives over memory that the ranks share.

gloo sends each of them through the loopback, which takes 0.3 ms at two ranks and 5 ms at four on two cores, more than
a small model's layer; over shared memory it is 10 us and 0.1 ms. gloo stays for everything else, and for all when the
ranks cannot share memory.
"""

import logging
import mmap
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    BarrierOptions,
    BroadcastOptions,
    PrefixStore,
    ProcessGroup,
    ProcessGroupGloo,
    ReduceOp,
    Store,
    Work,
)
from torch._C._profiler import _RecordFunctionFast

from bdlora_sglang.serving.cpu.completed_work import COMPLETED, CompletedWork
from bdlora_sglang.serving.cpu.over_gloo import OverGloo
from bdlora_sglang.serving.cpu.recording import one_step
from bdlora_sglang.serving.cpu.shared_collectives import Combine, SharedCollectives
from bdlora_sglang.serving.cpu.shared_segment import (
    RankLostError,
    SegmentUnavailableError,
    SharedSegment,
    map_file,
    share_segment,
)

logger = logging.getLogger(__name__)
BACKEND = "bdlora_shm"

# Twice this is what a group may come to take; nothing before it is used. Against 16 MiB, an all-reduce of 4 MiB takes
# 0.68 and 0.75 ms (two ranks, float32), 2.1 and 2.3 ms (four on two cores), 3.5 and 5.9 ms (four, bfloat16).
REGION_BYTES = 4 << 20

# Two ranks: one phase takes 9 us and two take 22 at 4 KiB, 43 and 77 at 128 KiB, and much the same above.
# Four ranks on two cores: 187 and 309 us at 128 KiB, 251 and 359 at 256 KiB, 576 and 556 at 1 MiB; for bfloat16 341 and
# 395, 490 and 429, 2484 and 921.
_ONE_PHASE_BYTES = 1 << 20

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_REDUCED_DTYPES = frozenset({*_FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})
_GATHERED_DTYPES = _REDUCED_DTYPES | {torch.bool}


def register_backend() -> None:
    """Make `BACKEND` known to ``torch.distributed`` in this process; gloo stays the default of CPU tensors."""
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, create_group, devices=["cpu"])


def create_group(
    store: Store,
    rank: int,
    size: int,
    timeout: timedelta,
    *,
    region_bytes: int = REGION_BYTES,
    one_phase_bytes: int | None = None,
    map_memory: Callable[[str, int], mmap.mmap] = map_file,
    first_step: int = 0,
) -> "SharedMemoryGroup | ProcessGroupGloo":
    """A group over shared memory; plain gloo for a single rank, or when the ranks cannot share memory.

    Args:
        store: for this group alone.
        region_bytes, map_memory, first_step: see `share_segment`.
        one_phase_bytes: see `SharedCollectives`; by default what is fastest.
    """
    gloo = ProcessGroupGloo(PrefixStore("gloo", store), rank, size, timeout)
    if size == 1:
        return gloo
    try:
        segment = share_segment(
            PrefixStore("segment", store), rank, size, region_bytes, map_memory=map_memory, first_step=first_step
        )
    except SegmentUnavailableError as error:
        if rank == 0:
            logger.warning("Collectives of %d ranks over gloo, which is slower than shared memory: %s", size, error)
        return gloo
    if rank == 0:
        logger.info("Collectives of %d ranks over shared memory", size)
    if one_phase_bytes is None:
        one_phase_bytes = region_bytes if size == 2 else _ONE_PHASE_BYTES
    return SharedMemoryGroup(store, gloo, segment, one_phase_bytes)


class SharedMemoryGroup(OverGloo):
    """Collectives of dense CPU tensors over shared memory, and everything else over gloo.

    Collectives over shared memory are over when the call returns, with ``async_op=True`` as well. Which way one goes
    depends on the operation, the dtype and the number of elements alone, which are the same on all ranks.

    A rank that dies, stops or leaves makes the others raise ``torch.distributed.DistBackendError``, at the latest
    after the timeout. The group cannot be used any more then, and every later call raises.
    """

    def __init__(self, store: Store, gloo: ProcessGroupGloo, segment: SharedSegment, one_phase_bytes: int) -> None:
        super().__init__(store, segment.rank, segment.size)
        self._gloo = ProcessGroup(store, segment.rank, segment.size)
        for group in (self, self._gloo):
            group._set_default_backend(ProcessGroup.BackendType.GLOO)
            group._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, gloo)
        self._gloo_backend = gloo
        self._segment = segment
        self._collectives = SharedCollectives(segment, self._exchange, one_phase_bytes)
        self._own_timeout = timedelta(0)
        self._unusable: str | None = None

    def getBackendName(self) -> str:
        return BACKEND

    def allreduce(  # type: ignore[override]
        self, tensors: Any, opts: Any = None, timeout: timedelta | None = None
    ) -> Work | None:
        if type(opts) is not AllreduceOptions:
            tensors, opts = _as_list(tensors), _as_options(AllreduceOptions, opts, timeout)
        tensor = tensors[0]
        combine = _combine_of(opts.reduceOp)
        if combine is None or len(tensors) > 1 or not _is_dense(tensor, _REDUCED_DTYPES):
            return self._gloo.allreduce(tensors, opts)
        self._serve("bdlora::all_reduce", tensors, opts.timeout, self._collectives.all_reduce, tensor, combine)
        return CompletedWork(tensors) if opts.asyncOp else COMPLETED

    def all_gather_single(  # type: ignore[override]
        self, output: torch.Tensor, tensor: torch.Tensor, opts: Any = None
    ) -> Work | None:
        opts = opts or AllgatherOptions()
        if output.numel() != self._segment.size * tensor.numel() or not _can_be_gathered([output], tensor):
            return self._gloo.all_gather_single(output, tensor, opts)
        # Recorded with its input alone: what this rank puts in.
        self._serve("bdlora::all_gather", [tensor], opts.timeout, self._collectives.all_gather, output, tensor)
        return CompletedWork(output) if opts.asyncOp else COMPLETED

    _allgather_base = all_gather_single  # type: ignore[assignment]  # its older name

    def allgather(  # type: ignore[override]
        self, output_tensors: Any, input_tensors: Any, opts: Any = None, timeout: timedelta | None = None
    ) -> Work | None:
        if isinstance(input_tensors, torch.Tensor):
            output_tensors, input_tensors = [output_tensors], [input_tensors]
        opts = _as_options(AllgatherOptions, opts, timeout)
        outputs, tensor = output_tensors[0], input_tensors[0]
        if (
            len(input_tensors) > 1
            or len(outputs) != self._segment.size
            or any(output.numel() != tensor.numel() for output in outputs)
            or not _can_be_gathered(outputs, tensor)
        ):
            return self._gloo.allgather(output_tensors, input_tensors, opts)
        self._serve(
            "bdlora::all_gather", input_tensors, opts.timeout, self._collectives.all_gather_into, outputs, tensor
        )
        return CompletedWork(output_tensors) if opts.asyncOp else COMPLETED

    def broadcast(  # type: ignore[override]
        self, tensors: Any, opts: Any = None, timeout: timedelta | None = None
    ) -> Work | None:
        tensors, opts = _as_list(tensors), _as_options(BroadcastOptions, opts, timeout)
        tensor = tensors[0]
        if len(tensors) > 1 or not _can_be_gathered([], tensor):
            return self._gloo.broadcast(tensors, opts)
        self._serve("bdlora::broadcast", tensors, opts.timeout, self._collectives.broadcast, tensor, opts.rootRank)
        return CompletedWork(tensors) if opts.asyncOp else COMPLETED

    def barrier(self, opts: Any = None, timeout: timedelta | None = None) -> Work | None:  # type: ignore[override]
        opts = _as_options(BarrierOptions, opts, timeout)
        self._serve("bdlora::barrier", [], opts.timeout, self._exchange)
        return CompletedWork() if opts.asyncOp else COMPLETED

    def abort(self) -> None:
        self._leave("was aborted")
        super().abort()

    def shutdown(self) -> None:
        self._leave("was shut down")
        super().shutdown()

    @one_step
    def _serve(
        self,
        name: str,
        tensors: list[torch.Tensor],
        own_timeout: timedelta,
        collective: Callable[..., None],
        *arguments: Any,
    ) -> None:
        """Run a collective as an event ``name`` of the profiler's, with ``tensors`` as its inputs.

        Raises:
            torch.distributed.DistBackendError: a rank is lost, now or earlier.
        """
        if self._unusable is not None:
            raise dist.DistBackendError(f"{name}: {self._unusable}")
        if tensors and tensors[0].numel() == 0:
            return
        if not torch.is_inference_mode_enabled():
            # Autograd has no part in collectives, and inference tensors may be written to in this mode alone.
            with torch.inference_mode():
                self._serve(name, tensors, own_timeout, collective, *arguments)
            return
        self._own_timeout = own_timeout
        with _RecordFunctionFast(name, tensors):
            try:
                collective(*arguments)
            except BaseException as error:
                self._fail(name, error)

    def _exchange(self) -> None:
        segment = self._segment
        segment.publish()
        if not segment.all_arrived():
            segment.wait(self._seconds_of(self._own_timeout))

    def _seconds_of(self, own: timedelta) -> float:
        """An operation's own timeout, or the group's, which gloo keeps: `set_timeout` sets it there."""
        return (own if own > timedelta(0) else self._gloo_backend.options._timeout).total_seconds()

    def _fail(self, name: str, error: BaseException) -> NoReturn:
        # In the midst of a collective this rank is no longer in step with the others, whatever the error was.
        self._leave(f"cannot be used any more: {name}: {error!s}")
        if isinstance(error, RankLostError):
            raise dist.DistBackendError(f"{name} of {self._label()}: {error}") from error
        raise error

    def _leave(self, why: str) -> None:
        if self._unusable is None:
            self._unusable = f"{self._label()} {why}"
            self._segment.leave()

    def _label(self) -> str:
        return f"group {self.group_name} ({self.group_desc}), rank {self._segment.rank} of {self._segment.size}"


def _combine_of(reduce_op: Any) -> Combine | None:
    if reduce_op == ReduceOp.SUM:
        return torch.add
    if reduce_op == ReduceOp.MAX:
        return torch.maximum
    return torch.minimum if reduce_op == ReduceOp.MIN else None


def _can_be_gathered(outputs: Sequence[torch.Tensor], tensor: torch.Tensor) -> bool:
    return all(_is_dense(each, _GATHERED_DTYPES) and each.dtype is tensor.dtype for each in (*outputs, tensor))


def _is_dense(tensor: torch.Tensor, dtypes: frozenset[torch.dtype]) -> bool:
    return tensor.dtype in dtypes and tensor.is_cpu and tensor.layout is torch.strided


def _as_list(tensors: Any) -> list[torch.Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else tensors


def _as_options(kind: type, opts: Any, timeout: timedelta | None) -> Any:
    """The options of PyTorch's other signatures, which name a reduction or a root rank instead, or nothing."""
    if isinstance(opts, kind):
        return opts
    options = kind()
    if isinstance(opts, int) and kind is BroadcastOptions:
        options.rootRank = opts
    elif opts is not None:
        options.reduceOp = opts
    if timeout is not None:
        options.timeout = timeout
    return options
