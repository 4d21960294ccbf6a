"""What BD-LoRA adds to SGLang's server arguments."""

from dataclasses import dataclass, field
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
class GateOptions:
    """What clients may do beyond sending requests for the base model and the adapters that are loaded.

    ``adapter_roots``: adapters are loaded from folders below these alone; None, as for an ``Engine`` in the caller's
    own process, allows all. ``aliases`` are further names of the base model. The others, where they are True: repo ids
    are downloaded from Hugging Face; an adapter that was unloaded is loaded again by the next request for it; a name
    that is unknown stands for the base model. The last two are SGLang's ways.
    """

    adapter_roots: tuple[str, ...] | None = None
    adapters_from_hub: bool = False
    reload_on_request: bool = False
    allow_unknown_models: bool = False
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class ServingOptions:
    """Options of our own, handed to every process of the server.

    ``max_local_rank`` sizes the memory pool: the largest rank that a slot holds on one GPU, all blocks of one module
    together. By default it is worked out from the adapters given at start, or is ``--max-lora-rank`` where that is set.

    ``skip_bad_adapters`` starts without those of the adapters given that cannot be served.

    Raises:
        BDLoRAError: ``max_local_rank`` with a sharding that knows no local rank.
    """

    max_local_rank: int | None = None
    lora_sharding: LoRASharding = LoRASharding.COMMUNICATION_FREE
    gate: GateOptions = field(default_factory=GateOptions)
    skip_bad_adapters: bool = False

    def __post_init__(self) -> None:
        if self.max_local_rank is not None and self.lora_sharding is not LoRASharding.COMMUNICATION_FREE:
            raise BDLoRAError(
                f"--max-local-rank: found {self.max_local_rank} with --lora-sharding {self.lora_sharding.value}, "
                "expected --max-lora-rank: there the whole rank counts"
            )
