"""The slots of a device with the Triton kernels: one tensor of factors and one of tables, for all layers together.

A slot is one run of memory, which holds one adapter as its block in host memory does: its layers one behind the other,
without room between them where the adapter is smaller than the slot. The tables say where a layer's factors begin, so
that writing a slot is two copies whatever the adapter.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from bdlora_kernels.layout import LayerFactors, align
from bdlora_kernels.packing import HostBlock, PackedAdapter
from bdlora_kernels.slot_size import SlotSize
from bdlora_kernels.tables import ENTRY_FIELDS, SliceTables

# `DeviceSlots.active_layers` where anything may be in the slots.
ALL_LAYERS = -1
# Offsets in a slot are int32.
_MOST_ELEMENTS = 2**31 - 1
# Rows of the tables are multiples of so many fields, for the same reason as `ALIGNMENT`.
_ROW_FIELDS = 16


@dataclass
class DeviceFactors(LayerFactors):
    """One layer in all slots: ``tables`` say what a slot holds of it, by offsets from its start, not ``slices``.

    ``index`` is the layer's place among those of the slots.
    """

    tables: SliceTables = field(kw_only=True)
    index: int = field(kw_only=True)


class DeviceSlots:
    """All slots of all layers. ``layers`` has those that a slot has room for."""

    def __init__(
        self, num_slots: int, sizes: Mapping[str, SlotSize], dtype: torch.dtype, device: torch.device, pin_memory: bool
    ) -> None:
        """Empty slots.

        Raises:
            ValueError: a slot has more elements than int32 counts.
        """
        sizes = {name: size for name, size in sizes.items() if size}
        self._pin_memory = pin_memory
        self._first_entry: dict[str, int] = {}
        elements = entries = 0
        for name, size in sizes.items():
            self._first_entry[name] = entries
            elements += align(size.a) + align(size.b)
            entries += SliceTables.entries_per_slot(size.ranks)
        if elements > _MOST_ELEMENTS:
            raise ValueError(f"found a slot of {elements} elements, expected at most {_MOST_ELEMENTS}")
        fields = -(-entries * ENTRY_FIELDS // _ROW_FIELDS) * _ROW_FIELDS
        # Zeros, so that the memory is really there: a server must not run out of it at its first request.
        self._factors_SE = torch.zeros(num_slots, elements, dtype=dtype, device=device)
        self._table_SF = torch.zeros(num_slots, fields, dtype=torch.int32, device=device)
        self._held_layers = [0] * num_slots
        self.h_size = max((size.ranks for size in sizes.values()), default=1)
        self.layers = {
            name: DeviceFactors(self._factors_SE, self._factors_SE, tables=self._tables(name, size), index=i)
            for i, (name, size) in enumerate(sizes.items())
        }

    def _tables(self, name: str, size: SlotSize) -> SliceTables:
        first, entries = self._first_entry[name], SliceTables.entries_per_slot(size.ranks)
        fields_SF = self._table_SF[:, first * ENTRY_FIELDS : (first + entries) * ENTRY_FIELDS]
        entries_SEF = fields_SF.view(len(fields_SF), entries, ENTRY_FIELDS)
        return SliceTables.on(entries_SEF, size.usual_rank, size.ranks, size.usual_ranks, size.gathered)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot, tables included."""
        return (self._factors_SE.nbytes + self._table_SF.nbytes) // len(self._factors_SE)

    def host_block(self, elements: int) -> HostBlock:
        """Host memory for an adapter of so many elements."""
        return HostBlock.allocate(elements, self._table_SF.shape[1], self._factors_SE.dtype, self._pin_memory)

    def describe(self, adapter: PackedAdapter) -> None:
        """Fill in the table of an adapter whose block is one of ours.

        Raises:
            ValueError: more ranks in a layer than a slot has room for.
        """
        buffer = bytearray(adapter.block.table_F.nbytes)
        for name, layer in adapter.layers.items():
            self.layers[name].tables.pack_into(buffer, self._first_entry[name], layer.slices_in_block())
        adapter.block.table_F.copy_(torch.frombuffer(buffer, dtype=torch.int32))

    def write(self, slot: int, adapter: PackedAdapter) -> None:
        """Fill a slot with a described adapter; copies from pinned memory do not wait for the device."""
        factors_E, table_F = adapter.block.factors_E, adapter.block.table_F
        self._factors_SE[slot, : len(factors_E)].copy_(factors_E, non_blocking=True)
        self._table_SF[slot].copy_(table_F, non_blocking=True)
        self._held_layers[slot] = sum(1 << self.layers[name].index for name in adapter.layers)

    def active_layers(self, slots: Iterable[int]) -> int:
        """A bit for each layer (`DeviceFactors.index`) that any of ``slots`` holds; negative ones hold nothing."""
        active = 0
        for slot in set(slots):
            if slot >= 0:
                active |= self._held_layers[slot]
        return active

    def zeros(self, *shape: int) -> torch.Tensor:
        """Of the factors' type, where they are."""
        return self._factors_SE.new_zeros(shape)

    def clear(self, slot: int) -> None:
        """Forget what a slot holds. Nothing is written: no token is sent there until it is filled again."""
        self._held_layers[slot] = 0
