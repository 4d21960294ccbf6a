"""Alpha-beta times of collectives among the GPUs of one machine.

NCCL's ring is timed as NCCL does it itself to choose a protocol (``ncclTopoGetAlgoTime``): a base latency, a latency
for each step of the ring, and bytes over bandwidth; of LL, LL128 and Simple the fastest counts. Small all-reduces may
also take the engine's own kernel.
"""

from dataclasses import dataclass
from enum import Enum

from bdlora_perf.estimate.hardware import (
    CUSTOM_ALL_REDUCE,
    CUSTOM_ALL_REDUCE_MAX,
    NCCL_BASE_LL,
    NCCL_BASE_LL128,
    NCCL_BASE_SIMPLE,
    NCCL_LL128_SHARE,
    NCCL_LL_CAP,
    NVLINK4,
    Link,
)


class Kind(Enum):
    ALL_REDUCE = "all-reduce"
    ALL_GATHER = "all-gather"


# LL's share of the ring's bandwidth, by NCCL's src/graph/tuning.cc.
_LL_SHARE = {Kind.ALL_REDUCE: 1 / 4, Kind.ALL_GATHER: 1 / 3}
_SHORT, _LONG = 512, 2**20


@dataclass(frozen=True)
class Collective:
    """One collective of ``elements``, each ``element_bytes`` long: what an all-reduce reads, an all-gather writes."""

    kind: Kind
    elements: float
    element_bytes: int

    @property
    def num_bytes(self) -> float:
        return self.elements * self.element_bytes

    def steps(self, tp: int) -> int:
        """Steps of the ring; each moves 1 / tp of the data."""
        return 2 * (tp - 1) if self.kind is Kind.ALL_REDUCE else tp - 1

    def sent_elements(self, tp: int) -> float:
        """What one rank sends in a ring."""
        return self.steps(tp) * self.elements / tp


def collective_seconds(collective: Collective, link: Link, tp: int) -> float:
    """The time of one collective, with everything that the ranks wait for."""
    if tp == 1:
        return 0.0
    seconds = _nccl_seconds(collective, link, tp)
    if (
        collective.kind is Kind.ALL_REDUCE
        and link.custom_all_reduce
        and tp in CUSTOM_ALL_REDUCE
        and collective.num_bytes <= CUSTOM_ALL_REDUCE_MAX.value * 2**20
    ):
        return min(seconds, _custom_seconds(collective.num_bytes, link, tp))
    return seconds


def _nccl_seconds(collective: Collective, link: Link, tp: int) -> float:
    steps, bandwidth = collective.steps(tp), link.bandwidth.value
    protocols = (
        (NCCL_BASE_LL, link.hop_ll, min(NCCL_LL_CAP.value, bandwidth * _LL_SHARE[collective.kind])),
        (NCCL_BASE_LL128, link.hop_ll128, bandwidth * NCCL_LL128_SHARE.value),
        (NCCL_BASE_SIMPLE, link.hop_simple, bandwidth),
    )
    moved = steps * collective.num_bytes / tp
    return min(
        (base.value + steps * hop.value) * 1e-6 + moved / (gb_per_second * 1e9)
        for base, hop, gb_per_second in protocols
    )


def _custom_seconds(num_bytes: float, link: Link, tp: int) -> float:
    """A line through the two measured points; its slope scales with the link (measured on NVLink 4)."""
    short, long = (constant.value for constant in CUSTOM_ALL_REDUCE[tp])
    slope = (long - short) / (_LONG - _SHORT) * NVLINK4.bandwidth.value / link.bandwidth.value
    return (short + slope * max(0.0, num_bytes - _SHORT)) * 1e-6
