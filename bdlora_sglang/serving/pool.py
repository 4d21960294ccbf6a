"""The memory pool: slots on the device, sized by local rank, that hold this rank's factors of the resident adapters."""

from collections.abc import Iterable, Mapping

import torch
from sglang.srt.lora.lora_config import LoRAConfig
from sglang.srt.lora.mem_pool import LoRAMemoryPool

from bdlora_kernels import LayerFactors
from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.serving.kernels import Kernels
from bdlora_sglang.serving.local_adapter import LocalAdapter
from bdlora_sglang.serving.sharding import Sharding, SlotSize


def slot_sizes_for_adapters(layers: Iterable[str], adapters: Iterable[LocalAdapter]) -> dict[str, SlotSize]:
    """Slots that just fit ``adapters``, the same for all layers of a kind (qkv_proj, o_proj, ...)."""
    by_kind: dict[str, SlotSize] = {}
    for adapter in adapters:
        for name, factors in adapter.layers.items():
            by_kind[_kind(name)] = SlotSize.of(factors).max(by_kind.get(_kind(name), SlotSize()))
    return {name: by_kind.get(_kind(name), SlotSize()) for name in layers}


class BDLoRAMemoryPool(LoRAMemoryPool):
    """SGLang's slots and eviction, over flat buffers that hold an adapter's local factors and no zeros.

    At the same rank, an adapter with N blocks takes 1/N of the memory on N ranks that SGLang's own pool would
    (``LoRAMemoryPool`` replicates A of column-parallel and B of row-parallel layers).
    """

    def __init__(
        self, *, slot_sizes: Mapping[str, SlotSize], sharding: Sharding, kernels: Kernels, **kwargs: object
    ) -> None:
        self._slot_sizes = slot_sizes
        self._sharding = sharding
        self._kernels = kernels
        super().__init__(**kwargs)

    def init_buffers(self, base_model: torch.nn.Module) -> None:
        """Allocate all slots; called by SGLang's constructor."""
        self.factors: dict[str, LayerFactors] = {
            name: self._kernels.allocate(self.max_loras_per_batch, size, self.dtype)
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
            size = self._slot_sizes.get(name, SlotSize())
            if size == SlotSize():
                raise BDLoRAError(
                    f"adapter '{adapter.name}': found LoRA on '{_kind(name)}', expected only target modules of this "
                    f"server: {', '.join(sorted({_kind(n) for n, s in self._slot_sizes.items() if s.a}))}; "
                    "start it with --lora-target-modules that include it"
                )
            if not size.fits(SlotSize.of(factors)):
                raise BDLoRAError(
                    f"adapter '{adapter.name}': found local rank {adapter.local_rank} ({adapter.kind}, rank "
                    f"{adapter.rank}, {adapter.nblocks} blocks) with {factors.a_E.numel()} + {factors.b_E.numel()} "
                    f"elements of '{name}', expected at most the slot's {size.a} + {size.b}; "
                    f"start the server with {self._sharding.flag_that_fits(adapter.rank, adapter.local_rank)} or more"
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
            self.factors[name].write(buffer_id, packed)

    def _clear_buffer_slot_for_base(self, buffer_id: int) -> None:
        for factors in self.factors.values():
            factors.clear(buffer_id)


def _kind(layer: str) -> str:
    return layer.rpartition(".")[2]
