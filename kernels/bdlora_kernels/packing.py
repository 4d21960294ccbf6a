"""Laying out the factors of a layer, and those of all layers of an adapter in one block of host memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bdlora_kernels.layout import PackedFactors, Slice, align


@dataclass(frozen=True)
class PlannedSlice:
    """A slice whose factors are still to be read.

    A is ``(rank, input_size)``, B ``(output_size, gathered * rank)``.
    """

    rank: int
    input_size: int
    output_size: int
    input_start: int
    output_start: int
    scaling: float
    read: Callable[[], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class LayerPlan:
    """A layer's slices in their order, where each will stand, and how many elements that takes."""

    parts: tuple[PlannedSlice, ...]
    slices: tuple[Slice, ...]
    a_elements: int
    b_elements: int
    gathered: int = 1

    def read_into(self, a_E: torch.Tensor, b_E: torch.Tensor) -> None:
        """Read every factor to its place."""
        for part, place in zip(self.parts, self.slices, strict=True):
            a, b = part.read()
            assert a.shape == (part.rank, part.input_size), (a.shape, part)
            assert b.shape == (part.output_size, self.gathered * part.rank), (b.shape, part)
            a_E[place.a_offset : place.a_offset + a.numel()].view(a.shape).copy_(a)
            b_E[place.b_offset : place.b_offset + b.numel()].view(b.shape).copy_(b)


def plan_layer(parts: Sequence[PlannedSlice], gathered: int = 1) -> LayerPlan:
    """Lay the factors of one layer out for a slot, in the order given; ``parts`` must not be empty.

    Neighbours that read the same inputs share one A matrix, so only the first of such a run is aligned. ``gathered``
    is the number of ranks whose shrink outputs B takes: its columns are those of ``gathered`` A factors.
    """
    slices: list[Slice] = []
    a_stop = b_stop = 0
    for part in parts:
        window = (part.input_start, part.input_size)
        if not slices or window != (slices[-1].input_start, slices[-1].input_size):
            a_stop = align(a_stop)
        b_stop = align(b_stop)
        slices.append(Slice(*window, part.output_start, part.output_size, part.rank, a_stop, b_stop, part.scaling))
        a_stop += part.rank * part.input_size
        b_stop += part.output_size * gathered * part.rank
    return LayerPlan(tuple(parts), tuple(slices), align(a_stop), align(b_stop), gathered)


@dataclass(frozen=True)
class UnpackedSlice:
    """A slice before packing: ``a`` is ``(rank, input_size)``, ``b`` is ``(output_size, rank)``."""

    a: torch.Tensor
    b: torch.Tensor
    input_start: int
    output_start: int
    scaling: float

    def planned(self) -> PlannedSlice:
        (rank, input_size), output_size = self.a.shape, self.b.shape[0]
        place = self.input_start, self.output_start, self.scaling
        return PlannedSlice(rank, input_size, output_size, *place, read=lambda: (self.a, self.b))


def pack(parts: Sequence[UnpackedSlice], gathered: int = 1) -> PackedFactors:
    """The factors of one layer, laid out by `plan_layer`."""
    plan = plan_layer([part.planned() for part in parts], gathered)
    a_E, b_E = parts[0].a.new_zeros(plan.a_elements), parts[0].b.new_zeros(plan.b_elements)
    plan.read_into(a_E, b_E)
    return PackedFactors(a_E, b_E, plan.slices, gathered)


@dataclass(frozen=True)
class HostBlock:
    """One run of host memory, pinned or not: factors, and behind them what the device's tables say of them."""

    factors_E: torch.Tensor
    table_F: torch.Tensor

    @classmethod
    def allocate(cls, elements: int, table_fields: int, dtype: torch.dtype, pin_memory: bool) -> "HostBlock":
        """Zeros; ``elements`` are a multiple of `ALIGNMENT`."""
        num_bytes = elements * dtype.itemsize
        block = torch.zeros(num_bytes + table_fields * 4, dtype=torch.uint8, pin_memory=pin_memory)
        return cls(block[:num_bytes].view(dtype), block[num_bytes:].view(torch.int32))


@dataclass(frozen=True)
class PackedAdapter:
    """One adapter's factors on this rank as a slot will hold them: ``layers`` are views of ``block``."""

    layers: Mapping[str, PackedFactors]
    block: HostBlock

    @property
    def num_bytes(self) -> int:
        """Bytes of the factors, with the few that align them."""
        return self.block.factors_E.nbytes

    def moved_to(self, block: HostBlock) -> "PackedAdapter":
        """The same factors in another block."""
        block.factors_E.copy_(self.block.factors_E)
        return PackedAdapter({name: _in_block(layer, block, layer.start) for name, layer in self.layers.items()}, block)


def pack_adapter(plans: Mapping[str, LayerPlan], allocate: Callable[[int], HostBlock]) -> PackedAdapter:
    """Read all layers of an adapter straight into one block of so many elements, one layer behind the other."""
    block = allocate(sum(plan.a_elements + plan.b_elements for plan in plans.values()))
    layers: dict[str, PackedFactors] = {}
    start = 0
    for name, plan in plans.items():
        layers[name] = layer = _in_block(plan, block, start)
        plan.read_into(layer.a_E, layer.b_E)
        start += plan.a_elements + plan.b_elements
    return PackedAdapter(layers, block)


def _in_block(layer: LayerPlan | PackedFactors, block: HostBlock, start: int) -> PackedFactors:
    b_start = start + layer.a_elements
    a_E, b_E = block.factors_E[start:b_start], block.factors_E[b_start : b_start + layer.b_elements]
    return PackedFactors(a_E, b_E, layer.slices, layer.gathered, start)
