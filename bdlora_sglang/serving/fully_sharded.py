"""S-LoRA's fully sharded mode: both factors cut over the ranks, and one more collective in every layer with LoRA.

Column-parallel layers gather the shrink output, row-parallel layers reduce it (S-LoRA, section 6.1). Every adapter is
served, a block-diagonal one in its dense form. The paper's baseline; `CommunicationFree` is what it is compared with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.distributed.parallel_state import GroupCoordinator
from sglang.srt.distributed.utils import get_group_rank_size
from sglang.srt.layers.linear import ColumnParallelLinear, RowParallelLinear
from sglang.srt.runtime_context import get_parallel

from bdlora_kernels import LayerFactors, PlannedSlice, SlotSize, plan_layer
from bdlora_kernels.layout import align
from bdlora_sglang.adapter import Adapter, LoRAModule
from bdlora_sglang.adapter.fully_sharded import read_column_parallel, read_row_parallel
from bdlora_sglang.adapter.shard import even_cut
from bdlora_sglang.serving.kernels import Kernels, LayerShape
from bdlora_sglang.serving.module_parts import ServedModule
from bdlora_sglang.serving.sharding import LocalPlan, layer_shape


class FullySharded:
    """`Sharding` as in S-LoRA; the ranks of a slot are whole ranks. The collectives are the layer's own group's.

    Of a row-parallel layer's output, the kernels see the part that this rank adds to.
    """

    description = "fully sharded as in S-LoRA, one more collective in each layer with LoRA"
    exchanges = True

    def flag_that_fits(self, rank: int, local_rank: int) -> str:
        return f"--max-lora-rank {rank}"

    def plan(
        self, adapter: Adapter, modules: Sequence[tuple[LoRAModule, ServedModule]], dtype: torch.dtype
    ) -> LocalPlan:
        parts = [_planned(adapter, module, served, dtype) for module, served in modules]
        served = modules[0][1]
        layer = plan_layer(parts, gathered=1 if served.row_parallel else served.tp_size)
        return LocalPlan(layer, max(part.rank for part in parts))

    def shape(self, name: str, layer: Any) -> LayerShape:
        if isinstance(layer, RowParallelLinear):
            return LayerShape(layer.input_size_per_partition, len(_own_outputs(layer)))
        return layer_shape(name, layer)

    def slot_size(self, name: str, layer: Any, rank: int) -> SlotSize:
        _, tp_size = get_group_rank_size(layer.tp_group)
        chunk = -(-rank // tp_size)
        if isinstance(layer, RowParallelLinear):
            outputs = -(-layer.output_size // tp_size)
            return SlotSize(align(rank * layer.input_size_per_partition), align(rank * outputs), rank, rank, rank)
        sizes = layer.output_partition_sizes
        ranks = len(sizes) * chunk
        b = sum(align(tp_size * chunk * size) for size in sizes)
        return SlotSize(align(ranks * layer.input_size), b, ranks, chunk, ranks, gathered=tp_size)

    def forward_with_base(
        self,
        layer: ColumnParallelLinear | RowParallelLinear,
        base: Callable[[], torch.Tensor],
        x_TI: torch.Tensor,
        factors: LayerFactors,
        kernels: Kernels,
        segments: Any,
    ) -> torch.Tensor:
        exchange = _LayerExchange(layer, _group(layer))
        outputs = self.shape("", layer).outputs
        if not isinstance(layer, RowParallelLinear):
            return kernels.forward_with_base(base, outputs, x_TI, factors, segments, exchange)
        own = _own_outputs(layer)
        y_TO = torch.empty(0)

        def own_part_of_base() -> torch.Tensor:
            nonlocal y_TO
            y_TO = base()
            return y_TO[:, own.start : own.stop]

        kernels.forward_with_base(own_part_of_base, outputs, x_TI, factors, segments, exchange)
        return y_TO


@dataclass(frozen=True)
class _LayerExchange:
    """The collective between shrink and expand: the sum of all ranks' outputs, or all of them one below the other.

    Those of one layer are equal, so that recordings of a decode step can be compared.
    """

    layer: torch.nn.Module
    group: GroupCoordinator | None

    def __call__(self, h_TW: torch.Tensor) -> torch.Tensor:
        if self.group is None:
            return h_TW
        if isinstance(self.layer, RowParallelLinear):
            return self.group.all_reduce(h_TW)
        return self.group.all_gather(h_TW, dim=0)


def _own_outputs(layer: RowParallelLinear) -> range:
    """The outputs of a row-parallel layer to which this rank adds LoRA's part."""
    rank, tp_size = get_group_rank_size(layer.tp_group)
    return even_cut(layer.output_size, tp_size, rank)


def _planned(adapter: Adapter, module: LoRAModule, served: ServedModule, dtype: torch.dtype) -> PlannedSlice:
    shard = served.shard
    if served.row_parallel:
        assert not shard.output_offset, shard  # its outputs are not padded
        # Counted from the first of the rank's own.
        rank, output_start = module.rank, 0
        output_size = len(even_cut(module.out_features, served.tp_size, served.tp_rank))
    else:
        rank, output_start, output_size = -(-module.rank // served.tp_size), shard.output_offset, len(shard.outputs)

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        read_factors = read_row_parallel if served.row_parallel else read_column_parallel
        factors = read_factors(adapter, module, shard, served.tp_rank, served.tp_size, dtype)
        return factors.a, factors.b

    return PlannedSlice(rank, len(shard.inputs), output_size, shard.input_offset, output_start, module.scaling, read)


def _group(layer: torch.nn.Module) -> GroupCoordinator | None:
    """The ranks over which ``layer`` is sharded; None where it is whole on each."""
    _, tp_size = get_group_rank_size(layer.tp_group)
    if tp_size == 1:
        return None
    group = (
        get_parallel().attn_tp_group if getattr(layer, "use_dp_attention_reduce", False) else get_parallel().tp_group
    )
    assert group.world_size == tp_size, f"a layer over {tp_size} ranks in a group of {group.world_size}"
    return group
