"""The operations that a group over shared memory leaves to gloo, each as a method of its own.

What a Python subclass of ``ProcessGroup`` does not define goes to the group's backend by itself, but with the
interpreter's lock held (``WORK_OVERRIDE`` in PyTorch's PyProcessGroup.hpp). gloo's thread may want that lock, to let go
of the last operation's tensors, while it holds gloo's queue, which the next operation waits for: nobody ever goes on.
A call of another group's method gives the lock up.
"""

from collections.abc import Callable
from typing import Any

from torch._C._distributed_c10d import ProcessGroup


def _by_gloo(name: str) -> Callable[..., Any]:
    def operation(self: "OverGloo", *arguments: Any, **options: Any) -> Any:
        return getattr(self._gloo, name)(*arguments, **options)

    operation.__name__ = name
    return operation


class OverGloo(ProcessGroup):
    """A group whose ``_gloo``, one of PyTorch's own, does what a subclass does not."""

    _gloo: ProcessGroup

    _reduce_scatter_base = _by_gloo("_reduce_scatter_base")
    all_gather_single_coalesced = _by_gloo("all_gather_single_coalesced")
    all_to_all_single = _by_gloo("all_to_all_single")
    allgather_coalesced = _by_gloo("allgather_coalesced")
    allgather_into_tensor_coalesced = _by_gloo("allgather_into_tensor_coalesced")
    allreduce_coalesced = _by_gloo("allreduce_coalesced")
    alltoall = _by_gloo("alltoall")
    alltoall_base = _by_gloo("alltoall_base")
    gather = _by_gloo("gather")
    gather_into_tensor = _by_gloo("gather_into_tensor")
    gather_single = _by_gloo("gather_single")
    monitored_barrier = _by_gloo("monitored_barrier")
    recv = _by_gloo("recv")
    recv_anysource = _by_gloo("recv_anysource")
    reduce = _by_gloo("reduce")
    reduce_scatter = _by_gloo("reduce_scatter")
    reduce_scatter_single = _by_gloo("reduce_scatter_single")
    reduce_scatter_single_coalesced = _by_gloo("reduce_scatter_single_coalesced")
    reduce_scatter_tensor_coalesced = _by_gloo("reduce_scatter_tensor_coalesced")
    scatter = _by_gloo("scatter")
    send = _by_gloo("send")
