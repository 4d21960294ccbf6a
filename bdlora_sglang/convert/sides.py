"""Which factor becomes block-diagonal: the usual module names, and the PEFT patterns that say so in a config."""

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum

from bdlora_sglang.adapter.config import BlockSide
from bdlora_sglang.errors import BDLoRAError


class TPSide(Enum):
    """How tensor parallelism cuts a linear module."""

    COLUMN = "column-parallel"  # ranks own output rows; BD-LoRA makes B block-diagonal
    ROW = "row-parallel"  # ranks own input columns; BD-LoRA makes A block-diagonal

    @property
    def block_side(self) -> BlockSide:
        return BlockSide.B if self is TPSide.COLUMN else BlockSide.A


# The last part of a module's name -> how engines cut it (vLLM's and SGLang's parallel layers, transformers' TP plans).
# The blocks of a fused module (qkv_proj, gate_up_proj) are contiguous rows of the fused weight, as PEFT stores them;
# a TP rank owns one window of each fused part, so it meets several blocks. That is exact, but not the smallest rank.
SIDES: Mapping[str, TPSide] = {
    **dict.fromkeys(
        (
            *(
                "q_proj",
                "k_proj",
                "v_proj",
                "qkv_proj",
            ),  # Llama, Qwen, Mistral, Gemma; Phi-3
            *("gate_proj", "up_proj", "gate_up_proj", "w1", "w3"),  # Llama; Mixtral
            *(
                "query_key_value",
                "dense_h_to_4h",
                "fc1",
                "fc_in",
                "c_fc",
                "in_proj",
                "wi_0",
                "wi_1",
                "wi",
            ),
            *(
                "Wqkv",
                "wqkv",
                "q",
                "k",
                "v",
                "query",
                "key",
                "value",
                "q_b_proj",
                "kv_b_proj",
                "w1",
                "w3",
            ),
            "lm_head",  # by the vocabulary
        ),
        TPSide.COLUMN,
    ),
    **dict.fromkeys(
        (
            *("o_proj", "out_proj", "down_proj", "w2", "wo", "o"),
            *(
                "dense_4h_to_h",
                "fc2",
                "fc_out",
                "dense",
            ),  # dense: the attention output of Falcon, BLOOM, GPT-NeoX, Phi
        ),
        TPSide.ROW,
    ),
}


def known_side(module: str) -> TPSide | None:
    """The side of a module by the last part of its name; None when the table does not know it."""
    return SIDES.get(module.rpartition(".")[2])


def choose_sides(
    modules: Iterable[str],
    target_modules_bd_a: Sequence[str] | None = None,
    target_modules_bd_b: Sequence[str] | None = None,
    keep_plain: bool = False,
) -> dict[str, BlockSide]:
    """The block side of every module.

    Patterns that are given match as PEFT's do, as substrings of the module's name, and decide alone; without any, the
    table does. A module that nothing matches stays plain with ``keep_plain``.

    Raises:
        BDLoRAError: a module matches patterns of both sides, or nothing matches it and ``keep_plain`` is false.
    """
    given = target_modules_bd_a is not None or target_modules_bd_b is not None
    sides: dict[str, BlockSide] = {}
    for module in modules:
        if given:
            in_a = next((p for p in target_modules_bd_a or () if p in module), None)
            in_b = next((p for p in target_modules_bd_b or () if p in module), None)
            if in_a is not None and in_b is not None:
                raise BDLoRAError(
                    f"module '{module}': found a match in both --target-modules-bd-a ('{in_a}') and "
                    f"--target-modules-bd-b ('{in_b}'), expected a match in one of them"
                )
            side = BlockSide.A if in_a is not None else BlockSide.B if in_b is not None else BlockSide.NONE
        else:
            known = known_side(module)
            side = BlockSide.NONE if known is None else known.block_side
        if side is BlockSide.NONE and not keep_plain:
            raise BDLoRAError(
                f"module '{module}': found no known side, expected a match in --target-modules-bd-a (row-parallel "
                f"layers) or --target-modules-bd-b (column-parallel layers), or --keep-plain to leave it a plain LoRA"
            )
        sides[module] = side
    return sides


def side_patterns(sides: Mapping[str, BlockSide]) -> tuple[list[str], list[str]]:
    """Patterns ``(target_modules_bd_a, target_modules_bd_b)`` by which PEFT finds exactly these sides.

    A pattern is the last part of a module's name where that is no substring of a module of another side ("dense" is
    one of "dense_h_to_4h"), else as many more parts as it takes.
    """
    return _patterns(sides, BlockSide.A), _patterns(sides, BlockSide.B)


def _patterns(sides: Mapping[str, BlockSide], side: BlockSide) -> list[str]:
    others = [name for name, other in sides.items() if other is not side]
    patterns: set[str] = set()
    for module in (name for name, own in sides.items() if own is side):
        parts = module.split(".")
        candidates = (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
        pattern = next((c for c in candidates if not any(c in other for other in others)), None)
        if pattern is None:
            clash = next(other for other in others if module in other)
            raise BDLoRAError(
                f"module '{module}': found '{clash}' with another side, expected a name that PEFT's substring patterns "
                "can tell apart"
            )
        patterns.add(pattern)
    return sorted(patterns)
