"""Which modules of the base model adapters may target, and which part of each a layer of this rank holds."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from sglang.srt.distributed.utils import get_group_rank_size
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

from bdlora_sglang.adapter import ModuleShard

# The PEFT modules that SGLang fuses into one layer, in the order of the layer's output. Models that have the fused
# module themselves (Phi-3) have its outputs in the same order.
FUSED_MODULES: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}

VOCABULARY = ("embed_tokens", "lm_head")

# What contains the language model, under names that differ between SGLang, releases of transformers and model classes.
_AROUND_THE_LANGUAGE_MODEL = ("model", "language_model")
# Heads that guess further tokens: transformers has none, so PEFT ignores adapters for them.
_MULTI_TOKEN_PREDICTION = ("mtp", "nextn")
_OTHER_MODALITIES = ("vision_config", "audio_config", "speech_config", "image_config")


@dataclass(frozen=True)
class ServedModule:
    """A PEFT module of the base model, or one part of its outputs: the SGLang layer that computes it and what of it
    this rank owns.

    ``in_features`` and ``out_features`` are the whole module's. ``tp_rank`` of ``tp_size`` is this rank's place among
    those over which the layer is sharded.
    """

    layer: str
    in_features: int
    out_features: int
    shard: ModuleShard
    row_parallel: bool
    tp_rank: int
    tp_size: int
    is_embedding: bool = False


@dataclass
class ServedModules:
    """All modules of a base model, by `module_key`.

    Attributes:
        parts: those that are served; of a module that SGLang computes in several places of a layer, each of them.
        refused: those that are not, each with the reason.
        roots: the first parts of the keys of everything in the base model.
        is_text_only: the base model knows no other input than text.
    """

    parts: dict[str, tuple[ServedModule, ...]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    roots: set[str] = field(default_factory=set)
    is_text_only: bool = True

    @property
    def layers(self) -> set[str]:
        """Names of the SGLang layers that compute them."""
        return {part.layer for parts in self.parts.values() for part in parts}

    def reason(self, key: str) -> str | None:
        """Why a module is not served, where the base model has it; None where it has none of that name."""
        for part in (key, key.rpartition(".")[0]):  # of a group of modules, the group
            if part in self.refused:
                return self.refused[part]
        experts, found, _ = key.partition(".experts.")
        return self.refused.get(f"{experts}.experts") if found else None

    def is_foreign(self, key: str) -> bool:
        """Whether the base model has nothing of the kind, so that PEFT ignores an adapter's weights for it."""
        root = key.partition(".")[0]
        if root in self.roots:
            return False
        return self.is_text_only or root.startswith(_MULTI_TOKEN_PREDICTION)

    def _add(self, key: str, parts: tuple[ServedModule, ...]) -> None:
        if key in self.parts or key in self.refused:
            layers = {part.layer for part in (*self.parts.pop(key, ()), *parts)}
            self.refused[key] = f"it may be one of {', '.join(sorted(layers))}"
        else:
            self.parts[key] = parts


def served_modules(
    base_model: torch.nn.Module, hf_config: object, refused: Mapping[str, str] = MappingProxyType({})
) -> ServedModules:
    """The modules that adapters may target.

    Args:
        base_model: SGLang's, not wrapped yet.
        hf_config: the whole config, not just that of the language model.
        refused: keys of modules that shall not be served, each with the reason.
    """
    unpadded = _unpadded_sizes(hf_config)
    # Multimodal models say which of their layers take LoRA; what they say of embeddings and heads is another's matter.
    takes_lora = getattr(base_model, "should_apply_lora", lambda name: True)
    served = ServedModules(is_text_only=not any(getattr(hf_config, name, None) for name in _OTHER_MODALITIES))
    # Tied embeddings have two names.
    for name, layer in base_model.named_modules(remove_duplicate=False):
        key = module_key(name)
        served.roots.add(key.partition(".")[0])
        if key in refused:
            served.refused[key] = refused[key]
        elif isinstance(layer, VocabParallelEmbedding):
            if key in VOCABULARY:
                served._add(key, (_vocabulary(name, layer),))
        elif (reason := _not_served(name, layer)) is not None:
            served.refused[key] = reason
        elif isinstance(layer, LinearBase) and not takes_lora(name):
            served.refused[key] = "SGLang's model takes LoRA on its language model alone"
        elif isinstance(layer, RowParallelLinear):
            served._add(key, (_row_parallel(name, layer, unpadded),))
        elif isinstance(layer, ColumnParallelLinear):
            parent, _, leaf = key.rpartition(".")
            parts = list(_column_parallel(name, layer, unpadded))
            if leaf in FUSED_MODULES:
                for module, part in zip(FUSED_MODULES[leaf], parts, strict=False):
                    served._add(f"{parent}.{module}" if parent else module, (part,))
                served._add(key, tuple(_as_one_module(parts)))
            elif len(parts) == 1:
                served._add(key, (parts[0],))
            else:
                served.refused[key] = f"SGLang computes it with others in one {type(layer).__name__}"
    return served


def module_key(name: str) -> str:
    """The name of a module without what contains the language model: the same for SGLang's names and an adapter's.

    All else of the path stays: an encoder's layer is not the decoder's of the same number.
    """
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _AROUND_THE_LANGUAGE_MODEL:
        del parts[0]
    return ".".join(parts)


def _not_served(name: str, layer: torch.nn.Module) -> str | None:
    if isinstance(layer, FusedMoE):
        return "LoRA on MoE experts is not supported"
    if not isinstance(layer, LinearBase):
        return None
    if name.rpartition(".")[2] == "kv_b_proj":
        return "attention absorbs kv_b_proj (MLA) and never computes it in decode"
    if not isinstance(layer, ColumnParallelLinear | RowParallelLinear):
        return f"LoRA on a {type(layer).__name__} is not supported"
    return None


def _vocabulary(name: str, layer: VocabParallelEmbedding) -> ServedModule:
    """The rank owns a window of the vocabulary: of an embedding's inputs, or of an output head's outputs."""
    shard = layer.shard_indices
    own, hidden = range(shard.org_vocab_start_index, shard.org_vocab_end_index), range(layer.embedding_dim)
    # The sharding that is served here needs no place among the ranks.
    place = {"tp_rank": 0, "tp_size": layer.tp_size}
    if module_key(name) == "lm_head":
        whole = ModuleShard(hidden, own)
        return ServedModule(name, layer.embedding_dim, layer.org_vocab_size, whole, row_parallel=False, **place)
    whole = ModuleShard(own, hidden)
    sizes = layer.org_vocab_size, layer.embedding_dim
    return ServedModule(name, *sizes, whole, row_parallel=True, is_embedding=True, **place)


def _row_parallel(name: str, layer: RowParallelLinear, unpadded: Mapping[int, int]) -> ServedModule:
    rank, size = get_group_rank_size(layer.tp_group)
    in_features = unpadded.get(layer.input_size, layer.input_size)
    inputs = _window(rank, layer.input_size_per_partition, in_features)
    shard = ModuleShard(inputs, range(layer.output_size))
    return ServedModule(name, in_features, layer.output_size, shard, True, rank, size)


def _column_parallel(name: str, layer: ColumnParallelLinear, unpadded: Mapping[int, int]) -> Iterator[ServedModule]:
    """One part for each output of the fused layer, in order."""
    rank, tp_size = get_group_rank_size(layer.tp_group)
    offset = 0
    for index, size in enumerate(layer.output_partition_sizes):
        position, full = rank, _full_output_size(layer, index)
        if isinstance(layer, QKVParallelLinear) and index > 0:
            # With fewer KV heads than ranks, neighbouring ranks hold the same head.
            position = get_group_rank_size(layer.kv_tp_group)[0] // layer.num_kv_head_replicas
        out_features = unpadded.get(full, full)
        outputs = _window(position, size, out_features)
        shard = ModuleShard(range(layer.input_size), outputs, output_offset=offset)
        yield ServedModule(name, layer.input_size, out_features, shard, False, rank, tp_size)
        offset += size


def _as_one_module(parts: list[ServedModule]) -> Iterator[ServedModule]:
    """The windows of a fused layer as those of one module, whose outputs are the parts' one after the other.

    Where one window ends at which the next begins, as on a single rank, they are one: one A for both.
    """
    out_features = sum(part.out_features for part in parts)
    first = 0
    last: ServedModule | None = None
    for part in parts:
        outputs = range(first + part.shard.outputs.start, first + part.shard.outputs.stop)
        first += part.out_features
        if last is not None and _follows(last.shard, outputs, part.shard.output_offset):
            outputs = range(last.shard.outputs.start, outputs.stop)
            last = replace(last, shard=replace(last.shard, outputs=outputs))
            continue
        if last is not None:
            yield last
        last = replace(part, out_features=out_features, shard=replace(part.shard, outputs=outputs))
    if last is not None:
        yield last


def _follows(shard: ModuleShard, outputs: range, output_offset: int) -> bool:
    return outputs.start == shard.outputs.stop and output_offset == shard.output_offset + len(shard.outputs)


def _full_output_size(layer: ColumnParallelLinear, index: int) -> int:
    """Output features of the whole, unreplicated module."""
    if isinstance(layer, QKVParallelLinear):
        heads = (layer.total_num_heads, layer.total_num_kv_heads, layer.total_num_kv_heads)
        sizes = (layer.head_size, layer.head_size, layer.v_head_size)
        return heads[index] * sizes[index]
    return layer.output_sizes[index] if isinstance(layer, MergedColumnParallelLinear) else layer.output_size


def _window(position: int, size: int, features: int) -> range:
    """Features ``[position * size, (position + 1) * size)``, without those past the end, which are padding."""
    return range(min(position * size, features), min((position + 1) * size, features))


def _unpadded_sizes(hf_config: object) -> dict[int, int]:
    """Real sizes by padded size, where SGLang has padded (``configs/update_config.py``, on the CPU)."""
    sizes: dict[int, int] = {}
    configs = {id(config): config for config in (hf_config, getattr(hf_config, "text_config", None)) if config}
    for config in configs.values():
        for attribute in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
            original = getattr(config, f"original_{attribute}", None)
            if original is not None:
                sizes[getattr(config, attribute)] = original
    return sizes
