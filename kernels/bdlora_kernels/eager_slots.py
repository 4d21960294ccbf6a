"""The slots of the PyTorch kernels: memory of its own for each layer.

Not one run of memory as in `DeviceSlots`: each B is transposed, and a CPU may keep float32 for a model of another type,
so a slot is not filled by copying a block.
"""

from collections.abc import Mapping

import torch

from bdlora_kernels.eager import EagerFactors
from bdlora_kernels.packing import HostBlock, PackedAdapter
from bdlora_kernels.slot_size import SlotSize


class EagerSlots:
    """All slots of all layers. ``layers`` has those that a slot has room for."""

    def __init__(
        self, num_slots: int, sizes: Mapping[str, SlotSize], dtype: torch.dtype, device: torch.device, pin_memory: bool
    ) -> None:
        """Empty slots."""
        self._num_slots, self._dtype, self._pin_memory = num_slots, dtype, pin_memory
        self.layers = {
            name: EagerFactors.allocate(num_slots, size.a, size.b, dtype, device)
            for name, size in sizes.items()
            if size
        }

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return sum(layer.a_SE.nbytes + layer.b_SE.nbytes for layer in self.layers.values()) // self._num_slots

    def host_block(self, elements: int) -> HostBlock:
        """Host memory for an adapter of so many elements."""
        return HostBlock.allocate(elements, 0, self._dtype, self._pin_memory)

    def describe(self, adapter: PackedAdapter) -> None:
        """Nothing: these kernels read no tables."""

    def write(self, slot: int, adapter: PackedAdapter) -> None:
        """Fill a slot."""
        for name, factors in self.layers.items():
            layer = adapter.layers.get(name)
            if layer is None:
                factors.clear(slot)
            else:
                factors.write(slot, layer)

    def clear(self, slot: int) -> None:
        """Empty a slot: its tokens get nothing added."""
        for factors in self.layers.values():
            factors.clear(slot)
