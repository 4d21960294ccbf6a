"""The memory pool: slots on the device, sized by local rank, that hold this rank's factors of the resident adapters."""

from collections.abc import Iterable, Mapping

import torch
from sglang.srt.lora.lora_config import LoRAConfig
from sglang.srt.lora.mem_pool import LoRAMemoryPool

from bdlora_kernels import PackedAdapter, SlotSize
from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.serving.kernels import Kernels, Slots
from bdlora_sglang.serving.local_adapter import AdapterPlan, LocalAdapter
from bdlora_sglang.serving.served_modules import layer_kind
from bdlora_sglang.serving.sharding import Sharding
from bdlora_sglang.serving.slot_guard import SlotGuard


def slot_sizes_for_adapters(layers: Iterable[str], adapters: Iterable[AdapterPlan]) -> dict[str, SlotSize]:
    """Slots that just fit ``adapters``, layer by layer."""
    sizes = dict.fromkeys(layers, SlotSize())
    for adapter in adapters:
        for name, layer in adapter.layers.items():
            sizes[name] = SlotSize.of(layer).max(sizes[name])
    return sizes


class BDLoRAMemoryPool(LoRAMemoryPool):
    """SGLang's slots and eviction, over flat buffers that hold an adapter's local factors and no zeros.

    At the same rank, an adapter with N blocks takes 1/N of the memory on N ranks that SGLang's own pool would
    (``LoRAMemoryPool`` replicates A of column-parallel and B of row-parallel layers). The base model has no slot.
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
        self.guard = SlotGuard(next(base_model.parameters()).device)
        self.slots: Slots = self._kernels.allocate(self.max_loras_per_batch, self._slot_sizes, self.dtype)

    @property
    def slot_elements(self) -> int:
        """Elements of the factors that a slot has room for, all layers together."""
        return sum(size.a + size.b for size in self._slot_sizes.values())

    def can_support(self, config: LoRAConfig | Iterable[LoRAConfig]) -> bool:
        """Always true: what fits depends on the local factors, see `check_fits`."""
        return True

    def check_fits(self, adapter: AdapterPlan) -> None:
        """Raise `BDLoRAError` when a slot is too small for ``adapter`` or a layer of it has no slot at all."""
        for name, layer in adapter.layers.items():
            size = self._slot_sizes.get(name, SlotSize())
            if not size:
                kinds = sorted({layer_kind(other) for other in self.slots.layers})
                flag = (
                    self._sharding.flag_that_fits(adapter.rank, adapter.local_rank)
                    if name in self._slot_sizes
                    else "--lora-target-modules that include it"
                )
                raise BDLoRAError(
                    f"adapter '{adapter.name}': found LoRA on '{name}', expected only layers that this server has room "
                    f"for ({', '.join(kinds)} of {len(self.slots.layers)} layers in all); start it with {flag}"
                )
            if not size.fits(SlotSize.of(layer)):
                raise BDLoRAError(
                    f"adapter '{adapter.name}': found local rank {adapter.local_rank} ({adapter.kind}, rank "
                    f"{adapter.rank}, {adapter.nblocks} blocks) with {layer.a_elements} + {layer.b_elements} elements "
                    f"of '{name}', expected at most the slot's {size.a} + {size.b}; start the server with "
                    f"{self._sharding.flag_that_fits(adapter.rank, adapter.local_rank)} or more"
                )

    def stage(self, adapter: PackedAdapter) -> PackedAdapter:
        """The same adapter, which fits, in host memory from which a slot can be filled at once."""
        staged = adapter.moved_to(self.slots.host_block(len(adapter.block.factors_E)))
        self.slots.describe(staged)
        return staged

    def load_lora_weight_to_buffer(
        self, uid: str | None, buffer_id: int, lora_adapter: LocalAdapter | None, *_modules: object
    ) -> None:
        """Copy an adapter's factors into slot ``buffer_id``."""
        assert uid is not None, "the base model has no slot"
        assert lora_adapter is not None, f"adapter {uid} is in a batch but was never loaded"
        self.guard.before_write(buffer_id)
        self.slots.write(buffer_id, lora_adapter.packed)

    def _clear_buffer_slot_for_base(self, buffer_id: int) -> None:
        self.slots.clear(buffer_id)
