"""The systems that are compared, and the adapters that each of them serves."""

from collections.abc import Iterable
from dataclasses import dataclass

from bdlora_sglang.errors import BDLoRAError


@dataclass(frozen=True)
class AdapterShape:
    """An adapter on all seven linear modules; ``nblocks`` is None for plain LoRA."""

    rank: int
    nblocks: int | None


@dataclass(frozen=True)
class ServedSystem:
    """A way to serve adapters.

    Attributes:
        name: as ``--systems`` and the report call it.
        label: as tables show it.
        rank_factor: the rank of its adapters in multiples of the plain LoRA rank r; None serves no adapters.
        block_diagonal: BD-LoRA with one block a TP rank, else plain LoRA.
        flags: of ``bdlora launch``.
        needs_gpu: SGLang's own LoRA kernels have no CPU version.
    """

    name: str
    label: str
    rank_factor: int | None = None
    block_diagonal: bool = False
    flags: tuple[str, ...] = ()
    needs_gpu: bool = False

    def adapter(self, rank: int, tp: int) -> AdapterShape | None:
        """What it serves where plain LoRA has rank ``rank``; raises `BDLoRAError` where blocks cannot share it."""
        if self.rank_factor is None:
            return None
        own_rank = self.rank_factor * rank
        if not self.block_diagonal:
            return AdapterShape(own_rank, None)
        if own_rank % tp:
            raise BDLoRAError(f"--rank {rank}: found rank {own_rank} for {self.name}, expected a multiple of TP {tp}")
        return AdapterShape(own_rank, tp)


_COMMUNICATION_FREE = ("--lora-sharding", "communication-free")

# What the others are compared with, the first one first.
BASELINES = ("lora-fully-sharded", "base")
SYSTEMS: dict[str, ServedSystem] = {
    system.name: system
    for system in (
        ServedSystem("base", "Base model, no LoRA"),
        ServedSystem("bd-2r", "BD-LoRA, rank 2r", 2, True, _COMMUNICATION_FREE),
        ServedSystem("bd-4r", "BD-LoRA, rank 4r", 4, True, _COMMUNICATION_FREE),
        ServedSystem("lora", "LoRA, communication-free", 1, False, _COMMUNICATION_FREE),
        ServedSystem(
            "lora-fully-sharded", "LoRA, fully sharded (S-LoRA)", 1, False, ("--lora-sharding", "fully-sharded")
        ),
        ServedSystem(
            "sglang-csgmv",
            "LoRA, SGLang csgmv",
            1,
            False,
            ("--lora-sharding", "sglang", "--lora-backend", "csgmv"),
            needs_gpu=True,
        ),
        ServedSystem(
            "sglang-triton-v2",
            "LoRA, SGLang triton_v2",
            1,
            False,
            ("--lora-sharding", "sglang", "--lora-backend", "triton_v2"),
            needs_gpu=True,
        ),
    )
}


def choose_systems(names: Iterable[str], has_gpu: bool) -> list[ServedSystem]:
    """The named systems in the order of `SYSTEMS`; all that run here where none is named.

    Raises:
        BDLoRAError: an unknown name, or a system that needs a GPU where there is none.
    """
    wanted = set(names) or {system.name for system in SYSTEMS.values() if has_gpu or not system.needs_gpu}
    for name in sorted(wanted):
        if name not in SYSTEMS:
            raise BDLoRAError(f"--systems: found {name!r}, expected names out of {', '.join(SYSTEMS)}")
        if SYSTEMS[name].needs_gpu and not has_gpu:
            raise BDLoRAError(f"--systems: found {name!r}, which needs a GPU, expected systems that run on a CPU")
    return [system for name, system in SYSTEMS.items() if name in wanted]
