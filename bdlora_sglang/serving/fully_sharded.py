"""S-LoRA's fully sharded mode: both factors cut over the ranks, and one more collective in every layer with LoRA.

Column-parallel layers gather the shrink output, row-parallel layers reduce it (S-LoRA, section 6.1). Every adapter is
served, a block-diagonal one in its dense form. The paper's baseline; `CommunicationFree` is what it is compared with.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from sglang.srt.distributed.parallel_state import GroupCoordinator
from sglang.srt.distributed.utils import get_group_rank_size
from sglang.srt.layers.linear import RowParallelLinear
from sglang.srt.runtime_context import get_parallel

from bdlora_kernels import EagerFactors, LayerFactors, PlannedSlice, SlotSize, plan_layer
from bdlora_kernels.eager import expand, shrink
from bdlora_kernels.layout import align
from bdlora_sglang.adapter import Adapter, LoRAModule
from bdlora_sglang.adapter.fully_sharded import read_column_parallel, read_row_parallel
from bdlora_sglang.adapter.shard import even_cut
from bdlora_sglang.serving.kernels import Kernels
from bdlora_sglang.serving.module_parts import ServedModule
from bdlora_sglang.serving.sharding import LocalPlan


class FullySharded:
    """`Sharding` as in S-LoRA; the ranks of a slot are whole ranks. The collectives are the layer's own group's."""

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

    def slot_size(self, name: str, layer: Any, rank: int) -> SlotSize:
        _, tp_size = get_group_rank_size(layer.tp_group)
        chunk = -(-rank // tp_size)
        if isinstance(layer, RowParallelLinear):
            outputs = -(-layer.output_size // tp_size)
            return SlotSize(align(rank * layer.input_size_per_partition), align(rank * outputs), rank, rank, rank)
        sizes = layer.output_partition_sizes
        modules = len(sizes)
        b = sum(align(tp_size * chunk * size) for size in sizes)
        return SlotSize(align(modules * chunk * layer.input_size), b, modules * chunk, chunk, modules * chunk)

    def forward_with_base(
        self,
        layer: torch.nn.Module,
        base: Callable[[], torch.Tensor],
        x_TI: torch.Tensor,
        factors: LayerFactors,
        kernels: Kernels,
        segments: Any,
    ) -> torch.Tensor:
        assert isinstance(factors, EagerFactors)
        y_TO = base()
        # Of the same shape on all ranks, so all of them leave here or none.
        h_TW = shrink(x_TI, factors, segments)
        if h_TW.numel() == 0:
            return y_TO
        group = _group(layer)
        if group is None:
            h_NTW = h_TW[None]
        elif isinstance(layer, RowParallelLinear):
            h_NTW = group.all_reduce(h_TW)[None]
        else:
            h_NTW = group.all_gather(h_TW, dim=0).unflatten(0, (group.world_size, len(h_TW)))
        expand(y_TO, h_NTW, factors, segments)
        return y_TO


def _planned(adapter: Adapter, module: LoRAModule, served: ServedModule, dtype: torch.dtype) -> PlannedSlice:
    shard = served.shard
    outputs = even_cut(module.out_features, served.tp_size, served.tp_rank)
    if served.row_parallel:
        rank, output_size, first_output = module.rank, len(outputs), outputs.start
    else:
        rank, output_size, first_output = -(-module.rank // served.tp_size), len(shard.outputs), 0

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        read_factors = read_row_parallel if served.row_parallel else read_column_parallel
        factors = read_factors(adapter, module, shard, served.tp_rank, served.tp_size, dtype)
        return factors.a, factors.b

    starts = shard.input_offset, shard.output_offset + first_output
    return PlannedSlice(rank, len(shard.inputs), output_size, *starts, module.scaling, read)


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
