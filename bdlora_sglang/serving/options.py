"""What BD-LoRA adds to SGLang's server arguments."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ServingOptions:
    """Options of our own, handed to every scheduler process.

    ``max_local_rank`` sizes the memory pool: the largest rank that a slot holds on one GPU, all blocks of one module
    together. By default it is worked out from the adapters given at start, or is ``--max-lora-rank`` where that is set.
    """

    max_local_rank: int | None = None
