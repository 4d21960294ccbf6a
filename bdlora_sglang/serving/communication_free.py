"""BD-LoRA's own sharding: each rank holds the blocks that meet its shard, and no rank waits for another."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from sglang.srt.layers.linear import ColumnParallelLinear, RowParallelLinear

from bdlora_kernels import LayerFactors, PlannedSlice, SlotSize, plan_layer
from bdlora_kernels.layout import align
from bdlora_sglang.adapter import Adapter, LoRAModule, LoRASlice, read_slice, slice_module
from bdlora_sglang.serving.kernels import Kernels, LayerShape
from bdlora_sglang.serving.module_parts import ServedModule
from bdlora_sglang.serving.sharding import ExpertProjection, LocalPlan, fused_modules, layer_shape


class CommunicationFree:
    """`Sharding` without communication; the ranks of a slot are local ranks."""

    description = "no communication for LoRA"
    exchanges = False

    def flag_that_fits(self, rank: int, local_rank: int) -> str:
        return f"--max-local-rank {local_rank}"

    def plan(
        self, adapter: Adapter, modules: Sequence[tuple[LoRAModule, ServedModule]], dtype: torch.dtype
    ) -> LocalPlan | None:
        parts: list[PlannedSlice] = []
        local_rank = 0
        for module, served in modules:
            slices = slice_module(module, served.shard)
            local_rank = max(local_rank, sum(part.rank for part in slices))
            parts += [_planned(adapter, part, dtype) for part in slices]
        return LocalPlan(plan_layer(parts), local_rank) if parts else None

    def shape(self, name: str, layer: torch.nn.Module | ExpertProjection) -> LayerShape:
        return layer_shape(name, layer)

    def slot_size(self, name: str, layer: torch.nn.Module | ExpertProjection, rank: int) -> SlotSize:
        shape = self.shape(name, layer)
        modules = fused_modules(layer)
        a, b = modules * rank * shape.inputs, rank * shape.outputs
        # There are at most `rank` slices of each module, and every one may start on an aligned element.
        slices = modules * rank
        padding = align(1) * slices
        return SlotSize(align(a) + padding, align(b) + padding, slices, rank, slices)

    def forward_with_base(
        self,
        layer: ColumnParallelLinear | RowParallelLinear,
        base: Callable[[], torch.Tensor],
        x_TI: torch.Tensor,
        factors: LayerFactors,
        kernels: Kernels,
        segments: Any,
    ) -> torch.Tensor:
        return kernels.forward_with_base(base, layer_shape("", layer).outputs, x_TI, factors, segments)


def _planned(adapter: Adapter, part: LoRASlice, dtype: torch.dtype) -> PlannedSlice:
    def read() -> tuple[torch.Tensor, torch.Tensor]:
        factors = read_slice(adapter, part, dtype)
        return factors.a, factors.b

    sizes = part.rank, part.input_size, part.output_size
    return PlannedSlice(*sizes, part.input_start, part.output_start, part.scaling, read)
