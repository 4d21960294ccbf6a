"""Where the factors of each slot stand in a layer's memory pool.

Shape suffixes: S slots, T tokens, I input features of this rank, O output features of this rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

# Factors start at multiples of this many elements: 16 bytes in 16-bit types, the widest load of one GPU thread.
ALIGNMENT = 8


@dataclass(frozen=True)
class Slice:
    """One small LoRA inside a slot: ``y[:, outputs] += scaling * (x[:, inputs] @ A.T) @ B.T``.

    A is ``(rank, input_size)`` and row-major at ``a_offset`` of the slot; B is ``(output_size, rank)`` and row-major at
    ``b_offset``. q, k and v are slices of a fused qkv layer, and the blocks of an adapter with more blocks than ranks
    are slices too. Slices that read the same inputs lie one behind the other, so that their A factors form one matrix.
    """

    input_start: int
    input_size: int
    output_start: int
    output_size: int
    rank: int
    a_offset: int
    b_offset: int
    scaling: float


@dataclass
class LayerFactors:
    """All slots of one layer: ``a_SE`` and ``b_SE`` hold E elements a slot, ``slices[slot]`` says what they mean.

    A slot without slices adds nothing (the base model, or an adapter that does not touch this layer).
    """

    a_SE: torch.Tensor
    b_SE: torch.Tensor
    slices: list[tuple[Slice, ...]] = field(default_factory=list)

    def a(self, slot: int, part: Slice) -> torch.Tensor:
        """A view of the slice's A, ``(rank, input_size)``."""
        return self._view(self.a_SE[slot], part.a_offset, part.rank, part.input_size)

    def b(self, slot: int, part: Slice) -> torch.Tensor:
        """A view of the slice's B, ``(output_size, rank)``."""
        return self._view(self.b_SE[slot], part.b_offset, part.output_size, part.rank)

    def write(self, slot: int, packed: "PackedFactors") -> None:
        """Fill a slot; copies from pinned memory do not wait for the device."""
        self.a_SE[slot, : packed.a_E.numel()].copy_(packed.a_E, non_blocking=True)
        self.b_SE[slot, : packed.b_E.numel()].copy_(packed.b_E, non_blocking=True)
        self.slices[slot] = packed.slices

    def clear(self, slot: int) -> None:
        """Empty a slot: its tokens get nothing added."""
        self.slices[slot] = ()

    @staticmethod
    def _view(flat: torch.Tensor, offset: int, rows: int, columns: int) -> torch.Tensor:
        return flat[offset : offset + rows * columns].view(rows, columns)


def align(elements: int) -> int:
    """Round up to the next offset at which a factor may start."""
    return -(-elements // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class PackedFactors:
    """One adapter's factors for one layer, flat; B takes the shrink outputs of ``gathered`` ranks."""

    a_E: torch.Tensor
    b_E: torch.Tensor
    slices: tuple[Slice, ...]
    gathered: int = 1

    @property
    def num_bytes(self) -> int:
        return self.a_E.numel() * self.a_E.element_size() + self.b_E.numel() * self.b_E.element_size()


@dataclass(frozen=True)
class UnpackedSlice:
    """A slice before packing: ``a`` is ``(rank, input_size)``, ``b`` is ``(output_size, rank)``."""

    a: torch.Tensor
    b: torch.Tensor
    input_start: int
    output_start: int
    scaling: float


def pack(parts: Sequence[UnpackedSlice], gathered: int = 1) -> PackedFactors:
    """Lay the factors of one layer out for a slot, in the order given; ``parts`` must not be empty.

    Neighbours that read the same inputs share one A matrix, so only the first of such a run is aligned. ``gathered``
    is the number of ranks whose shrink outputs B takes: its columns are those of ``gathered`` A factors.
    """
    slices: list[Slice] = []
    a_stop = b_stop = 0
    for part in parts:
        (rank, input_size), output_size = part.a.shape, part.b.shape[0]
        assert part.b.shape[1] == gathered * rank, (part.a.shape, part.b.shape, gathered)
        window = (part.input_start, input_size)
        if not slices or window != (slices[-1].input_start, slices[-1].input_size):
            a_stop = align(a_stop)
        b_stop = align(b_stop)
        slices.append(Slice(*window, part.output_start, output_size, rank, a_stop, b_stop, part.scaling))
        a_stop += rank * input_size
        b_stop += part.b.numel()
    a_E = parts[0].a.new_zeros(align(a_stop))
    b_E = parts[0].b.new_zeros(align(b_stop))
    for part, place in zip(parts, slices, strict=True):
        a_E[place.a_offset : place.a_offset + part.a.numel()] = part.a.flatten()
        b_E[place.b_offset : place.b_offset + part.b.numel()] = part.b.flatten()
    return PackedFactors(a_E, b_E, tuple(slices), gathered)
