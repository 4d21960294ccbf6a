"""What of PEFT's modules an SGLang layer computes on this rank."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from sglang.srt.distributed.utils import get_group_rank_size
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.utils import use_intel_amx_backend

from bdlora_sglang.adapter import ModuleShard
from bdlora_sglang.adapter.shard import even_cut


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


def vocabulary_part(name: str, layer: VocabParallelEmbedding, is_head: bool) -> ServedModule:
    """The rank owns a window of the vocabulary: of an embedding's inputs, or of an output head's outputs."""
    shard = layer.shard_indices
    own, hidden = range(shard.org_vocab_start_index, shard.org_vocab_end_index), range(layer.embedding_dim)
    # The sharding that is served here needs no place among the ranks.
    place = {"tp_rank": 0, "tp_size": layer.tp_size}
    if is_head:
        whole = ModuleShard(hidden, own)
        return ServedModule(name, layer.embedding_dim, layer.org_vocab_size, whole, row_parallel=False, **place)
    whole = ModuleShard(own, hidden)
    sizes = layer.org_vocab_size, layer.embedding_dim
    return ServedModule(name, *sizes, whole, row_parallel=True, is_embedding=True, **place)


def replicated_part(name: str, layer: ReplicatedLinear) -> ServedModule:
    """The whole module, on every rank."""
    whole = ModuleShard(range(layer.input_size), range(layer.output_size))
    return ServedModule(name, layer.input_size, layer.output_size, whole, row_parallel=False, tp_rank=0, tp_size=1)


def row_parallel_part(name: str, layer: RowParallelLinear, unpadded: Mapping[int, int]) -> ServedModule:
    """A window of the inputs, and all outputs."""
    rank, size = get_group_rank_size(layer.tp_group)
    in_features = unpadded.get(layer.input_size, layer.input_size)
    inputs = _window(rank, layer.input_size_per_partition, in_features)
    shard = ModuleShard(inputs, range(layer.output_size))
    return ServedModule(name, in_features, layer.output_size, shard, True, rank, size)


def column_parallel_parts(
    name: str, layer: ColumnParallelLinear, unpadded: Mapping[int, int]
) -> Iterator[ServedModule]:
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


def why_experts_are_not_served(layer: FusedMoE) -> str | None:
    """None where `expert_parts` says what the layer computes."""
    config = layer.moe_runner_config
    if type(layer) is not FusedMoE or not isinstance(layer.quant_method, UnquantizedFusedMoEMethod):
        return f"LoRA on experts of a {type(layer).__name__} by {type(layer.quant_method).__name__} is not supported"
    if use_intel_amx_backend(layer):
        return "LoRA on experts is not supported with weights that are packed for AMX"
    if layer.moe_ep_size > 1 or layer.num_fused_shared_experts:
        return "LoRA on experts is not supported with expert parallelism, nor with shared experts among them"
    is_known = config.is_gated and config.activation in ("silu", "gelu") and config.swiglu_limit is None
    if not is_known or (has_interleaved_experts(layer) and not config.gate_up_interleaved):
        return f"LoRA on experts is not supported with their activation ({config.activation})"
    if config.apply_router_weight_on_input:
        return "LoRA on experts is not supported where their inputs are weighted"
    return None


def expert_parts(
    name: str, layer: FusedMoE, unpadded: Mapping[int, int]
) -> Iterator[tuple[str, tuple[ServedModule, ...]]]:
    """The projections of each expert, as of an MLP: w13 is column-parallel, w2 row-parallel."""
    place = layer.moe_tp_rank, layer.moe_tp_size
    hidden, size = range(layer.hidden_size), layer.intermediate_size_per_partition
    features = unpadded.get(size * place[1], size * place[1])
    # SGLang pads either the whole, or the share of each rank.
    own = _window(place[0], size, features) if layer.use_padded_loading else even_cut(features, place[1], place[0])
    for expert in range(layer.num_experts):
        w13, w2 = f"{name}.{expert}.gate_up_proj", f"{name}.{expert}.down_proj"
        if has_interleaved_experts(layer):
            outputs = range(2 * own.start, 2 * own.stop)
            both = [ServedModule(w13, len(hidden), 2 * features, ModuleShard(hidden, outputs), False, *place)]
        else:
            shards = [ModuleShard(hidden, own, output_offset=offset) for offset in (0, size)]
            gate, up = (ServedModule(w13, len(hidden), features, shard, False, *place) for shard in shards)
            yield f"{expert}.gate_proj", (gate,)
            yield f"{expert}.up_proj", (up,)
            both = [*as_one_module([gate, up])]
        yield f"{expert}.gate_up_proj", tuple(both)
        yield f"{expert}.down_proj", (ServedModule(w2, features, len(hidden), ModuleShard(own, hidden), True, *place),)


def has_interleaved_experts(layer: FusedMoE) -> bool:
    """Whether outputs of gate and up alternate, as in gpt-oss and its parameters in transformers."""
    return layer.moe_runner_config.gemm1_alpha is not None


def as_one_module(parts: list[ServedModule]) -> Iterator[ServedModule]:
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


def unpadded_sizes(hf_config: object) -> dict[int, int]:
    """Real sizes by padded size, where SGLang has padded (``configs/update_config.py``, on the CPU)."""
    sizes: dict[int, int] = {}
    configs = {id(config): config for config in (hf_config, getattr(hf_config, "text_config", None)) if config}
    for config in configs.values():
        for attribute in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
            original = getattr(config, f"original_{attribute}", None)
            if original is not None:
                sizes[getattr(config, attribute)] = original
    return sizes
