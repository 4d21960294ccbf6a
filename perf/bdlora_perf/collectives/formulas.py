"""What the papers say that LoRA sends in one forward pass."""

from collections import Counter

from bdlora_perf.collectives.count import Collective


def agree(found: Counter[Collective], expected: Counter[Collective]) -> bool:
    """Whether as many of each kind and shape were found; of each kind alone where replayed graphs have no shapes."""
    if all(collective.shape is not None for collective in found):
        return found == expected
    kinds, expected_kinds = (Counter(each.operation for each in counter.elements()) for counter in (found, expected))
    return kinds == expected_kinds


def added_by_lora(fully_sharded: bool, tokens: int, rank: int, num_layers: int, num_ranks: int) -> Counter[Collective]:
    """Collectives that LoRA of one rank on all seven linear modules adds to the base model's, for so many tokens.

    None when it is communication-free (BD-LoRA, section 3). Fully sharded (S-LoRA, section 6.2), each layer gathers the
    shrink outputs of q, k, v and those of gate, up, and reduces those of o and of down: 5 (N - 1) r T / N elements in
    attention and 4 (N - 1) r T / N in the MLP, where N ranks divide r.
    """
    if not fully_sharded or num_ranks == 1:
        return Counter()
    chunk = -(-rank // num_ranks)
    per_layer = Counter(
        {
            Collective("all_gather", (tokens, 3 * chunk)): 1,
            Collective("all_gather", (tokens, 2 * chunk)): 1,
            Collective("all_reduce", (tokens, rank)): 2,
        }
    )
    return Counter({collective: count * num_layers for collective, count in per_layer.items()})
