"""Times of collectives among the GPUs of one machine: a measured latency, and bytes over a measured bus bandwidth."""

from dataclasses import dataclass
from enum import Enum

from bdlora_perf.estimate.hardware import CUSTOM_ALL_REDUCE, CUSTOM_ALL_REDUCE_MAX, NCCL, NVLINK3, Link


class Kind(Enum):
    ALL_REDUCE = "all-reduce"
    ALL_GATHER = "all-gather"


@dataclass(frozen=True)
class Collective:
    """One collective of ``elements``, each ``element_bytes`` long: what an all-reduce reads, an all-gather writes."""

    kind: Kind
    elements: float
    element_bytes: int

    @property
    def num_bytes(self) -> float:
        return self.elements * self.element_bytes

    def sent_elements(self, tp: int) -> float:
        """What one rank sends in a ring."""
        return (2 if self.kind is Kind.ALL_REDUCE else 1) * (tp - 1) * self.elements / tp


def collective_seconds(collective: Collective, link: Link, tp: int, latency: float | None = None) -> float:
    """The time of one collective, with everything that the ranks wait for.

    Measured on eight A100 with NCCL; other links move bytes in proportion to their own bandwidth. A small all-reduce
    takes the engine's own kernel.

    Args:
        latency: seconds, in place of the measured one of LoRA's collectives (to ask which it would take).
    """
    if tp == 1:
        return 0.0
    base, bus = NCCL[collective.kind.value]
    bandwidth = bus.value * 1e9 * link.bandwidth.value / NVLINK3.bandwidth.value
    seconds = base.value * 1e-6 if latency is None else latency
    small = collective.num_bytes <= CUSTOM_ALL_REDUCE_MAX.value * 2**20
    if latency is None and small and collective.kind is Kind.ALL_REDUCE and link.custom_all_reduce:
        seconds = CUSTOM_ALL_REDUCE.value * 1e-6
    return seconds + collective.sent_elements(tp) * collective.element_bytes / bandwidth
