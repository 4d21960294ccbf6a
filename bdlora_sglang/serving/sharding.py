"""How an adapter is spread over the ranks: what a slot holds of it and how its delta is computed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from sglang.srt.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

from bdlora_kernels import LayerFactors, LayerPlan, SlotSize
from bdlora_sglang.adapter import Adapter, LoRAModule
from bdlora_sglang.serving.kernels import Kernels, LayerShape
from bdlora_sglang.serving.module_parts import ServedModule
from bdlora_sglang.serving.served_modules import module_key


@dataclass(frozen=True)
class ExpertProjection:
    """One product of one expert on this rank, which LoRA takes for a layer of ``modules`` fused PEFT modules."""

    shape: LayerShape
    modules: int


@dataclass(frozen=True)
class LocalPlan:
    """One adapter's part of one layer on this rank, still to be read. ``rank`` is the largest of its modules here."""

    layer: LayerPlan
    rank: int


class Sharding(Protocol):
    """One way to shard LoRA over the ranks of a layer.

    ``description`` ends the line that a server prints at its start. ``exchanges`` says whether ranks wait for one
    another between shrink and expand.
    """

    description: str
    exchanges: bool

    def flag_that_fits(self, rank: int, local_rank: int) -> str:
        """The flag of a server whose slots hold an adapter of this ``rank``, ``local_rank`` of it on one GPU."""

    def plan(
        self, adapter: Adapter, modules: Sequence[tuple[LoRAModule, ServedModule]], dtype: torch.dtype
    ) -> LocalPlan | None:
        """This rank's factors of the modules of one layer, in output order; None when it holds none of them.

        Reading them raises `AdapterError` for NaN, infinity, or a value too large for ``dtype``.
        """

    def shape(self, name: str, layer: torch.nn.Module | ExpertProjection) -> LayerShape:
        """What the kernels read and write of ``name`` on this rank."""

    def slot_size(self, name: str, layer: torch.nn.Module | ExpertProjection, rank: int) -> SlotSize:
        """One of ``name`` that fits any adapter of at most ``rank``: the local or the whole one (`flag_that_fits`)."""

    def forward_with_base(
        self,
        layer: ColumnParallelLinear | RowParallelLinear,
        base: Callable[[], torch.Tensor],
        x_TI: torch.Tensor,
        factors: LayerFactors,
        kernels: Kernels,
        segments: Any,
    ) -> torch.Tensor:
        """``base()``, the layer's output on this rank before its own all-reduce, with LoRA's part added.

        ``segments`` are those that ``kernels`` made of the batch.
        """


def layer_shape(name: str, layer: torch.nn.Module | ExpertProjection) -> LayerShape:
    """What a layer reads and writes on this rank, before its own collective.

    Of an embedding, that is a column for each token of the vocabulary; tied layers are told apart by ``name``.
    """
    if isinstance(layer, ExpertProjection):
        return layer.shape
    if isinstance(layer, RowParallelLinear):
        return LayerShape(layer.input_size_per_partition, layer.output_size)
    if isinstance(layer, ColumnParallelLinear):
        return LayerShape(layer.input_size, sum(layer.output_partition_sizes))
    if isinstance(layer, ReplicatedLinear):
        return LayerShape(layer.input_size, layer.output_size)
    assert isinstance(layer, VocabParallelEmbedding), f"{name}: a {type(layer).__name__}"
    hidden, tokens = layer.embedding_dim, layer.num_embeddings_per_partition
    if module_key(name) == "lm_head":
        return LayerShape(hidden, tokens)
    return LayerShape(tokens, hidden, looks_up=True)


def fused_modules(layer: torch.nn.Module | ExpertProjection) -> int:
    """How many PEFT modules a layer computes side by side."""
    if isinstance(layer, ExpertProjection):
        return layer.modules
    return len(layer.output_partition_sizes) if isinstance(layer, ColumnParallelLinear) else 1
