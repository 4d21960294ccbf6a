"""Where the factors of each slot stand in a layer's memory pool.

Shape suffixes: S slots, T tokens, I input features of this rank, O output features of this rank.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

# Factors start at multiples of this many elements, and slots are so many apart. Triton sees that an argument is a
# multiple of 16, and of nothing else: with such a stride between slots it loads 16 bytes at once.
ALIGNMENT = 16


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


# A `Slice` as `cpu_kernels` reads it: its columns of h start at ``h_start``, and B takes those of ``gathered`` ranks.
ENTRY = np.dtype(
    [
        *((name, np.int64) for name in ("input_start", "input_size", "output_start", "output_size", "rank")),
        *((name, np.int64) for name in ("a_offset", "b_offset", "h_start", "gathered")),
        ("scaling", np.float32),
    ],
    align=True,
)
# The same of the tokens of one slot: those at ``places[start:stop]``.
SEGMENT = np.dtype([(name, np.int64) for name in ("slot", "start", "stop")])
# Of factors.
CPU_DTYPES = (torch.float32, torch.bfloat16)
# What TP ranks do with their shrink outputs before the expand: from this rank's, `(T, R)`, to `(N * T, R)`, those that
# N ranks hold, one below the other. Both are of the type of x.
Exchange = Callable[[torch.Tensor], torch.Tensor]


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
    """One adapter's factors for one layer, flat; B takes the shrink outputs of ``gathered`` ranks.

    ``start`` is where ``a_E`` begins in the adapter's block, with ``b_E`` right behind it (`pack_adapter`).
    """

    a_E: torch.Tensor
    b_E: torch.Tensor
    slices: tuple[Slice, ...]
    gathered: int = 1
    start: int = 0

    @property
    def a_elements(self) -> int:
        return self.a_E.numel()

    @property
    def b_elements(self) -> int:
        return self.b_E.numel()

    @property
    def num_bytes(self) -> int:
        return self.a_E.numel() * self.a_E.element_size() + self.b_E.numel() * self.b_E.element_size()

    def slices_in_block(self) -> tuple[Slice, ...]:
        """The same slices, with offsets from the start of the adapter's block."""
        b_start = self.start + self.a_elements
        return tuple(
            replace(part, a_offset=self.start + part.a_offset, b_offset=b_start + part.b_offset) for part in self.slices
        )
