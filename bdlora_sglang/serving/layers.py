"""SGLang's parallel linear layers with BD-LoRA."""

import torch
from sglang.srt.layers.linear import ColumnParallelLinear, LinearBase, ReplicatedLinear, RowParallelLinear
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.lora.backend.base_backend import BaseLoRABackend
from sglang.srt.lora.layers import (
    BaseLayerWithLoRA,
    ColumnParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
)

from bdlora_kernels import LayerFactors
from bdlora_sglang.serving.experts import ExpertsWithBDLoRA, ProjectionWithBDLoRA
from bdlora_sglang.serving.served_modules import module_key
from bdlora_sglang.serving.vocabulary import EmbeddingWithBDLoRA, LMHeadWithBDLoRA


class _BDLoRALayer(BaseLayerWithLoRA):
    """What the wrappers of linear layers share. SGLang's forward is inherited; the backend reads ``factors``."""

    factors: LayerFactors
    # SGLang's forward hands these to the backend, which does not need them.
    lora_a = lora_b = output_offset = _output_offset = lora_offsets = None

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


class ReplicatedLinearWithBDLoRA(_BDLoRALayer, ReplicatedLinearWithLoRA):
    """LoRA on a layer that every rank has, and computes, as a whole."""


WRAPPERS = (
    ColumnParallelLinearWithBDLoRA,
    RowParallelLinearWithBDLoRA,
    ReplicatedLinearWithBDLoRA,
    EmbeddingWithBDLoRA,
    LMHeadWithBDLoRA,
    ProjectionWithBDLoRA,
)


def wrap_layer(name: str, layer: torch.nn.Module, lora_backend: BaseLoRABackend) -> BaseLayerWithLoRA:
    """The LoRA wrapper for one of the `ServedModules.layers`, or for all of an MoE layer's experts.

    A tied head is the embedding under another name.
    """
    if isinstance(layer, ColumnParallelLinear):
        return ColumnParallelLinearWithBDLoRA(layer, lora_backend)
    if isinstance(layer, RowParallelLinear):
        return RowParallelLinearWithBDLoRA(layer, lora_backend)
    if isinstance(layer, ReplicatedLinear):
        return ReplicatedLinearWithBDLoRA(layer, lora_backend)
    if isinstance(layer, FusedMoE):
        return ExpertsWithBDLoRA(layer, lora_backend)
    assert isinstance(layer, VocabParallelEmbedding), f"{name}: a {type(layer).__name__}"
    return (LMHeadWithBDLoRA if module_key(name) == "lm_head" else EmbeddingWithBDLoRA)(layer, lora_backend)
