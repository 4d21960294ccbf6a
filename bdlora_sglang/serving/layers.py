"""SGLang's parallel linear layers with BD-LoRA, and which part of each PEFT module a layer of this rank holds."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from sglang.srt.distributed.utils import get_group_rank_size
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from sglang.srt.lora.backend.base_backend import BaseLoRABackend
from sglang.srt.lora.layers import (
    BaseLayerWithLoRA,
    ColumnParallelLinearWithLoRA,
    RowParallelLinearWithLoRA,
)

from bdlora_kernels import LayerFactors
from bdlora_sglang.adapter import ModuleShard
from bdlora_sglang.errors import BDLoRAError

# The PEFT modules that SGLang fuses into one layer, in the order of the layer's output.
FUSED_MODULES: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


class _BDLoRALayer(BaseLayerWithLoRA):
    """What both wrappers share. SGLang's forward is inherited; the backend reads ``factors``."""

    factors: LayerFactors
    # SGLang's forward hands these to the backend, which does not need them.
    lora_a = lora_b = output_offset = lora_offsets = None

    def __init__(self, base_layer: LinearBase, lora_backend: BaseLoRABackend) -> None:
        # Not SGLang's own constructors: they allocate pinned memory, which needs a GPU.
        BaseLayerWithLoRA.__init__(self, base_layer, lora_backend)

    def set_lora_info(self, factors: LayerFactors) -> None:
        self.factors = factors
        self.set_lora = True


class ColumnParallelLinearWithBDLoRA(_BDLoRALayer, ColumnParallelLinearWithLoRA):
    """LoRA on a column-parallel layer, fused (qkv, gate-up) or not."""


class RowParallelLinearWithBDLoRA(_BDLoRALayer, RowParallelLinearWithLoRA):
    """LoRA on a row-parallel layer; its delta rides in the layer's own all-reduce."""


def wrap_layer(name: str, layer: torch.nn.Module, lora_backend: BaseLoRABackend) -> BaseLayerWithLoRA:
    """The LoRA wrapper for ``layer``; raises `BDLoRAError` for a kind of layer that BD-LoRA does not serve."""
    if isinstance(layer, ColumnParallelLinear):
        return ColumnParallelLinearWithBDLoRA(layer, lora_backend)
    if isinstance(layer, RowParallelLinear):
        return RowParallelLinearWithBDLoRA(layer, lora_backend)
    raise BDLoRAError(
        f"base model: LoRA target '{name}': found a {type(layer).__name__}, expected a column-parallel or row-parallel "
        "linear layer (LoRA on MoE experts, embeddings and replicated layers is not supported)"
    )


@dataclass(frozen=True)
class ServedModule:
    """One PEFT module of the base model: the SGLang layer that computes it and the part that this rank owns.

    ``tp_rank`` of ``tp_size`` is this rank's place among those over which the layer is sharded.
    """

    layer: str
    in_features: int
    out_features: int
    shard: ModuleShard
    row_parallel: bool
    tp_rank: int
    tp_size: int


def served_modules(base_model: torch.nn.Module, hf_config: object) -> dict[str, ServedModule]:
    """The modules that adapters may target, by `module_key`. ``base_model`` must not be wrapped yet."""
    unpadded = _unpadded_sizes(hf_config)
    # Multimodal models say which of their layers take LoRA: the vision tower's have the same names.
    takes_lora = getattr(base_model, "should_apply_lora", lambda name: True)
    served: dict[str, ServedModule] = {}
    for name, layer in base_model.named_modules():
        if not isinstance(layer, LinearBase) or not takes_lora(name):
            continue
        if isinstance(layer, RowParallelLinear):
            served[module_key(name)] = _row_parallel(name, layer, unpadded)
        elif isinstance(layer, ColumnParallelLinear):
            parent, _, leaf = name.rpartition(".")
            modules = FUSED_MODULES.get(leaf, (leaf,))
            for module, part in zip(modules, _column_parallel(name, layer, unpadded), strict=False):
                served[module_key(f"{parent}.{module}")] = part
    return served


def module_key(name: str) -> str:
    """The part of a module's name that Hugging Face and SGLang share: from ``layers.`` on."""
    _, separator, rest = name.partition("layers.")
    return separator + rest if separator else name


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
    for attribute in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
        original = getattr(hf_config, f"original_{attribute}", None)
        if original is not None:
            sizes[getattr(hf_config, attribute)] = original
    return sizes
