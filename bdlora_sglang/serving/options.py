"""What BD-LoRA adds to SGLang's server arguments."""

from dataclasses import dataclass
from enum import Enum

from bdlora_sglang.errors import BDLoRAError


class LoRASharding(str, Enum):
    """How adapters are spread over the ranks, and who serves them.

    ``SGLANG`` leaves LoRA to SGLang's own classes, for comparison: plain adapters alone, on a GPU.
    """

    COMMUNICATION_FREE = "communication-free"
    FULLY_SHARDED = "fully-sharded"
    SGLANG = "sglang"


@dataclass(frozen=True)
class ServingOptions:
    """Options of our own, handed to every scheduler process.

    ``max_local_rank`` sizes the memory pool: the largest rank that a slot holds on one GPU, all blocks of one module
    together. By default it is worked out from the adapters given at start, or is ``--max-lora-rank`` where that is set.

    Raises:
        BDLoRAError: ``max_local_rank`` with a sharding that knows no local rank.
    """

    max_local_rank: int | None = None
    lora_sharding: LoRASharding = LoRASharding.COMMUNICATION_FREE

    def __post_init__(self) -> None:
        if self.max_local_rank is not None and self.lora_sharding is not LoRASharding.COMMUNICATION_FREE:
            raise BDLoRAError(
                f"--max-local-rank: found {self.max_local_rank} with --lora-sharding {self.lora_sharding.value}, "
                "expected --max-lora-rank: there the whole rank counts"
            )
