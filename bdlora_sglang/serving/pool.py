"""The memory pool: slots on the device, sized by local rank, that hold this rank's factors of the resident adapters."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.linear import RowParallelLinear
from sglang.srt.lora.lora_config import LoRAConfig
from sglang.srt.lora.mem_pool import LoRAMemoryPool

from bdlora_kernels import LayerFactors
from bdlora_kernels.layout import align
from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.serving.local_adapter import LocalAdapter


@dataclass(frozen=True)
class SlotSize:
    """Elements that one slot of one layer holds for the A and the B factors."""

    a: int
    b: int

    def max(self, other: "SlotSize") -> "SlotSize":
        return SlotSize(max(self.a, other.a), max(self.b, other.b))


def slot_sizes_for_rank(layers: Mapping[str, Any], local_rank: int) -> dict[str, SlotSize]:
    """Slots that fit any adapter of at most ``local_rank`` on this rank, for SGLang's parallel layers by name."""
    sizes = {}
    for name, layer in layers.items():
        if isinstance(layer, RowParallelLinear):
            size = SlotSize(local_rank * layer.input_size_per_partition, local_rank * layer.output_size)
        else:
            outputs = layer.output_partition_sizes
            size = SlotSize(len(outputs) * local_rank * layer.input_size, local_rank * sum(outputs))
        # Every slice may start on an aligned element, and there are at most local_rank of them for each output.
        padding = align(1) * local_rank * 3
        sizes[name] = SlotSize(align(size.a) + padding, align(size.b) + padding)
    return sizes


def slot_sizes_for_adapters(layers: Iterable[str], adapters: Iterable[LocalAdapter]) -> dict[str, SlotSize]:
    """Slots that just fit ``adapters``, the same for all layers of a kind (qkv_proj, o_proj, ...)."""
    by_kind: dict[str, SlotSize] = {}
    for adapter in adapters:
        for name, factors in adapter.layers.items():
            size = SlotSize(factors.a_E.numel(), factors.b_E.numel())
            by_kind[_kind(name)] = size.max(by_kind.get(_kind(name), SlotSize(0, 0)))
    return {name: by_kind.get(_kind(name), SlotSize(0, 0)) for name in layers}


class BDLoRAMemoryPool(LoRAMemoryPool):
    """SGLang's slots and eviction, over flat buffers that hold an adapter's local factors and no zeros.

    At the same rank, an adapter with N blocks takes 1/N of the memory on N ranks that SGLang's own pool would
    (``LoRAMemoryPool`` replicates A of column-parallel and B of row-parallel layers).
    """

    def __init__(self, *, slot_sizes: Mapping[str, SlotSize], device: torch.device, **kwargs: object) -> None:
        self._slot_sizes = slot_sizes
        self._device = device
        super().__init__(**kwargs)

    def init_buffers(self, base_model: torch.nn.Module) -> None:
        """Allocate all slots; called by SGLang's constructor."""
        slots = self.max_loras_per_batch
        # Zeros, so that the memory is really there: a server must not run out of it at its first request.
        self.factors = {
            name: LayerFactors(
                a_SE=torch.zeros(slots, size.a, dtype=self.dtype, device=self._device),
                b_SE=torch.zeros(slots, size.b, dtype=self.dtype, device=self._device),
                slices=[()] * slots,
            )
            for name, size in self._slot_sizes.items()
        }

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot, all layers together."""
        return sum(size.a + size.b for size in self._slot_sizes.values()) * self.dtype.itemsize

    def can_support(self, config: LoRAConfig | Iterable[LoRAConfig]) -> bool:
        """Always true: what fits depends on the local factors, see `check_fits`."""
        return True

    def check_fits(self, adapter: LocalAdapter) -> None:
        """Raise `BDLoRAError` when a slot is too small for ``adapter`` or a layer of it has no slot at all."""
        for name, factors in adapter.layers.items():
            size = self._slot_sizes.get(name, SlotSize(0, 0))
            if size == SlotSize(0, 0):
                raise BDLoRAError(
                    f"adapter '{adapter.name}': found LoRA on '{_kind(name)}', expected only target modules of this "
                    f"server: {', '.join(sorted({_kind(n) for n, s in self._slot_sizes.items() if s.a}))}; "
                    "start it with --lora-target-modules that include it"
                )
            if factors.a_E.numel() > size.a or factors.b_E.numel() > size.b:
                raise BDLoRAError(
                    f"adapter '{adapter.name}': found local rank {adapter.local_rank} ({adapter.kind}, rank "
                    f"{adapter.rank}, {adapter.nblocks} blocks) with {factors.a_E.numel()} + {factors.b_E.numel()} "
                    f"elements in '{name}', expected at most the slot's {size.a} + {size.b}; "
                    f"start the server with --max-local-rank {adapter.local_rank} or more"
                )

    def load_lora_weight_to_buffer(
        self, uid: str | None, buffer_id: int, lora_adapter: LocalAdapter | None, *_modules: object
    ) -> None:
        """Copy an adapter's factors into slot ``buffer_id``; ``uid`` None, the base model, empties it."""
        self._clear_buffer_slot_for_base(buffer_id)
        if uid is None:
            return
        assert lora_adapter is not None, f"adapter {uid} is in a batch but was never loaded"
        for name, packed in lora_adapter.layers.items():
            factors = self.factors[name]
            factors.a_SE[buffer_id, : packed.a_E.numel()].copy_(packed.a_E, non_blocking=True)
            factors.b_SE[buffer_id, : packed.b_E.numel()].copy_(packed.b_E, non_blocking=True)
            factors.slices[buffer_id] = packed.slices

    def _clear_buffer_slot_for_base(self, buffer_id: int) -> None:
        for factors in self.factors.values():
            factors.slices[buffer_id] = ()


def _kind(layer: str) -> str:
    return layer.rpartition(".")[2]
