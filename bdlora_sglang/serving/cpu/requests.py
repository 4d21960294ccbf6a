"""Requests on their way from rank 0 to the other ranks, before every step."""

from dataclasses import fields
from typing import Any

from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import broadcast_pyobj


class _SharedMemoryRequestReceiver(SchedulerRequestReceiver):
    """Broadcasts over the group of the model's collectives; SGLang takes one of gloo's, whatever the platform is."""

    __slots__ = ()

    def _broadcast_reqs_across_ranks(
        self, recv_reqs: list[Any] | None, local_reqs: list[Any] | None = None
    ) -> list[Any]:
        parallel = get_parallel()
        if parallel.attn_dp_enabled or parallel.tp_size == 1:
            return super()._broadcast_reqs_across_ranks(recv_reqs, local_reqs)
        group = parallel.tp_group
        own = None if recv_reqs is None else [*recv_reqs, *(local_reqs or [])]
        return broadcast_pyobj(own, group.rank, group.device_group, src=group.ranks[0])


def request_receiver_over_shared_memory(receiver: Any) -> SchedulerRequestReceiver:
    """``receiver``, with another way from rank to rank."""
    return _SharedMemoryRequestReceiver(**{field.name: getattr(receiver, field.name) for field in fields(receiver)})
