"""What the Triton kernels read from device memory: where tokens and factors stand.

All tables have a fixed capacity and fixed addresses, so that a captured CUDA graph finds new adapters and new batches
in them. They are filled by asynchronous copies on the current stream; nothing here waits for the device.

Shape suffixes: S slots, G tiles of tokens, T tokens, B blocks of rows of A, P slices, F fields of one entry.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from bdlora_kernels.layout import Slice

# int32 fields of an entry: one aligned load of 16 or 32 bytes.
TILE_FIELDS = 4
ENTRY_FIELDS = 8
_FIELD_BYTES = 4
# Ranks that one program multiplies at a time: a tensor core takes 16; with more than 64 it runs out of registers.
_MIN_BLOCK, _MAX_BLOCK = 16, 64
# Elements of one 16-byte load in 16-bit types.
_WIDEST = 8
# Programs of the shrink that share a tile's rows of A, at most: so many counters a tile.
_MAX_ROW_PROGRAMS = 16
# q, k and v are three.
_FIRST_ENTRIES = 4


@dataclass(frozen=True)
class ShrinkGroup:
    """``h[:, h_start + r] = x[:, inputs] @ A[r]`` for the ``rank`` rows of an A that lies at ``a_offset``."""

    input_start: int
    input_size: int
    rank: int
    a_offset: int
    h_start: int

    def blocks(self, block_rows: int) -> list["ShrinkGroup"]:
        """The same rows in blocks of at most ``block_rows``."""
        return [
            ShrinkGroup(
                self.input_start,
                self.input_size,
                min(block_rows, self.rank - row),
                self.a_offset + row * self.input_size,
                self.h_start + row,
            )
            for row in range(0, self.rank, block_rows)
        ]


@dataclass(frozen=True)
class ExpandSlice:
    """``y[:, outputs] += scaling * h[:, h_start : h_start + rank] @ B.T`` for the B that lies at ``b_offset``.

    Of N gathered shrink outputs, B takes ``rank / N`` columns each, from ``h_start`` on.
    """

    output_start: int
    output_size: int
    rank: int
    b_offset: int
    h_start: int
    scaling: float


def shrink_groups(slices: Sequence[Slice]) -> list[ShrinkGroup]:
    """The A matrices of a slot: neighbours that read the same inputs are one. ``h`` holds one column a row of A."""
    groups: list[ShrinkGroup] = []
    h_start = 0
    for (input_start, input_size), run in groupby(slices, key=lambda part: (part.input_start, part.input_size)):
        parts = list(run)
        rank = sum(part.rank for part in parts)
        groups.append(ShrinkGroup(input_start, input_size, rank, parts[0].a_offset, h_start))
        h_start += rank
    return groups


def expand_slices(slices: Sequence[Slice], gathered: int = 1) -> list[ExpandSlice]:
    """The B matrices of a slot, which read the columns of ``h`` that `shrink_groups` writes on ``gathered`` ranks."""
    parts: list[ExpandSlice] = []
    h_start = 0
    for part in slices:
        outputs = (part.output_start, part.output_size)
        parts.append(ExpandSlice(*outputs, gathered * part.rank, part.b_offset, h_start, part.scaling))
        h_start += part.rank
    return parts


class _SlotTable:
    """Entries of ENTRY_FIELDS integers for each slot, behind a header.

    The header's fields are the number of entries, and of the slot's B for this layer the first element and how many.
    """

    def __init__(self, entries_SEF: torch.Tensor, block_rank: int) -> None:
        """On entries that may be a view of a larger table."""
        self.entries_SEF, self.block_rank = entries_SEF, block_rank
        self.capacity = entries_SEF.shape[1] - 1

    def _pack_into(
        self, buffer: bytearray, first: int, entries: Sequence[tuple[int, ...]], b: tuple[int, int] = (0, 0)
    ) -> None:
        if len(entries) > self.capacity:
            raise ValueError(f"found {len(entries)} entries, expected at most {self.capacity}")
        for index, fields in enumerate([(len(entries), *b), *entries], first):
            struct.pack_into(f"={len(fields)}i", buffer, index * ENTRY_FIELDS * _FIELD_BYTES, *fields)


class ShrinkTable(_SlotTable):
    """For each slot, the blocks of at most ``block_rank`` rows of A that its tokens are multiplied with.

    ``row_programs`` share them, as many as a usual slot has where all its slices read the same inputs. Where there are
    more, of an adapter with more ranks or more blocks than TP ranks (which read less each), a program does several.
    """

    def __init__(self, entries_SEF: torch.Tensor, usual_ranks: int) -> None:
        super().__init__(entries_SEF, _block_rank(usual_ranks))
        self.row_programs = min(-(-usual_ranks // self.block_rank), _MAX_ROW_PROGRAMS)

    def pack_into(
        self, buffer: bytearray, first: int, groups: Sequence[ShrinkGroup], b: tuple[int, int] = (0, 0)
    ) -> None:
        """Write the entries of one slot; raises ValueError beyond the table's capacity.

        ``b`` says which elements of the slot the shrink may bring to the cache for the expand: the first, and how many.
        """
        blocks = [block for group in groups for block in group.blocks(self.block_rank)]
        fields = [(it.input_start, it.input_size, it.rank, it.a_offset, it.h_start) for it in blocks]
        self._pack_into(buffer, first, fields, b)


class ExpandTable(_SlotTable):
    """For each slot, its slices, whose columns are multiplied ``block_rank`` at a time, or fewer in a prefill.

    Rows of B are loaded ``width`` elements at a time where it divides the rank; slices of an odd rank are slower.
    ``usual_rank`` counts the columns of B for all of the ``gathered`` TP ranks whose shrink outputs it takes.
    """

    def __init__(self, entries_SEF: torch.Tensor, usual_rank: int, gathered: int = 1) -> None:
        super().__init__(entries_SEF, _block_rank(usual_rank))
        self.gathered = gathered
        self.width = min(1 << (usual_rank - 1).bit_length(), _WIDEST)
        # Entries that a program looks at together, all of which are there: a power of two.
        self.first_entries = min(1 << (self.capacity.bit_length() - 1), _FIRST_ENTRIES)

    def pack_into(self, buffer: bytearray, first: int, slices: Sequence[ExpandSlice]) -> None:
        """Write the entries of one slot; raises ValueError beyond the table's capacity."""
        fields = [(s.output_start, s.output_size, s.rank, s.b_offset, s.h_start, _bits(s.scaling)) for s in slices]
        self._pack_into(buffer, first, fields)


@dataclass(frozen=True)
class SliceTables:
    """The tables of one layer, a view of those of all layers or alone.

    A slot's part is `entries_per_slot` entries, one behind the other; ``h_size`` is the largest sum of its ranks.
    """

    shrink: ShrinkTable
    expand: ExpandTable
    h_size: int

    @staticmethod
    def entries_per_slot(h_size: int) -> int:
        return 2 * (1 + h_size)

    @classmethod
    def on(
        cls,
        entries_SEF: torch.Tensor,
        usual_rank: int,
        h_size: int,
        usual_ranks: int | None = None,
        gathered: int = 1,
    ) -> "SliceTables":
        """Tables on memory of ``(slots, entries_per_slot, ENTRY_FIELDS)``, whose zeros mean that slots are empty.

        Args:
            entries_SEF: rows may lie apart.
            usual_rank: rank of a slice; larger ones are served in several steps.
            h_size: largest sum of the ranks of a slot, however many slices they are of.
            usual_ranks: that sum for most adapters; larger ones are served in several steps. Without it, ``h_size``.
            gathered: TP ranks whose shrink outputs B takes.
        """
        shrink_SEF, expand_SEF = entries_SEF[:, : 1 + h_size], entries_SEF[:, 1 + h_size :]
        shrink = ShrinkTable(shrink_SEF, usual_ranks or h_size)
        return cls(shrink, ExpandTable(expand_SEF, gathered * usual_rank, gathered), h_size)

    @classmethod
    def allocate(
        cls,
        num_slots: int,
        usual_rank: int,
        h_size: int,
        device: torch.device,
        gathered: int = 1,
        usual_ranks: int | None = None,
    ) -> "SliceTables":
        """Empty tables of one layer alone, with what `on` takes."""
        shape = num_slots, cls.entries_per_slot(h_size), ENTRY_FIELDS
        zeros_SEF = torch.zeros(shape, dtype=torch.int32, device=device)
        return cls.on(zeros_SEF, usual_rank, h_size, usual_ranks, gathered)

    def pack_into(self, buffer: bytearray, first: int, slices: Sequence[Slice]) -> None:
        """Write a slot's part from entry ``first`` of a host buffer on; no slices: its tokens are left alone.

        Raises:
            ValueError: more ranks than ``h_size``.
        """
        total = sum(part.rank for part in slices)
        if total > self.h_size:
            raise ValueError(f"found {total} ranks together, expected at most {self.h_size}")
        b_first = min((part.b_offset for part in slices), default=0)
        gathered = self.expand.gathered
        b_stop = max((part.b_offset + part.output_size * gathered * part.rank for part in slices), default=0)
        self.shrink.pack_into(buffer, first, shrink_groups(slices), (b_first, b_stop - b_first))
        self.expand.pack_into(buffer, first + 1 + self.h_size, expand_slices(slices, gathered))

    def write(self, slot: int, slices: Sequence[Slice]) -> None:
        """Replace what ``slot`` holds of this layer alone; raises ValueError like `pack_into`."""
        fields = self.entries_per_slot(self.h_size) * ENTRY_FIELDS
        buffer = bytearray(fields * _FIELD_BYTES)
        self.pack_into(buffer, 0, slices)
        half = torch.frombuffer(buffer, dtype=torch.int32).view(2, -1, ENTRY_FIELDS)
        copy_to_device(self.shrink.entries_SEF[slot], half[0])
        copy_to_device(self.expand.entries_SEF[slot], half[1])


class SegmentTable:
    """The tokens of a batch, sorted by slot and cut into tiles of at most ``block_tokens`` tokens of one slot.

    Unused tiles have no tokens: their programs exit at once, so a launch may cover more tiles than there are.
    ``counters`` are the shrink's: each launch leaves them zero, and so does each batch, should a launch be aborted.
    """

    def __init__(self, max_tokens: int, max_segments: int, block_tokens: int, device: torch.device) -> None:
        """Room for ``max_tokens`` tokens of up to ``max_segments`` slots."""
        self.max_tokens, self.max_segments, self.block_tokens = max_tokens, max_segments, block_tokens
        tiles = self.max_tiles(max_tokens)
        self._tile_start = tiles * _MAX_ROW_PROGRAMS
        self._token_start = self._tile_start + tiles * TILE_FIELDS
        # Counters, tiles and tokens in one buffer: one copy a batch. Each part starts at 16 bytes.
        self._buffer = torch.zeros(self._token_start + max_tokens, dtype=torch.int32, device=device)
        self.counters = self._buffer[: self._tile_start]
        self.tiles_GF = self._buffer[self._tile_start : self._token_start].view(-1, TILE_FIELDS)
        self.tokens_T = self._buffer[self._token_start :]

    def max_tiles(self, num_tokens: int) -> int:
        """The most tiles that ``num_tokens`` tokens can fall into: each slot's last tile may be partly filled."""
        return min(num_tokens, -(-num_tokens // self.block_tokens) + self.max_segments - 1)

    def fill(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Describe a batch.

        Args:
            slots: the slot of each request; negative for the base model, whose tokens fall into no tile.
            lengths: the number of tokens of each request, in the order in which they lie in the batch.
        """
        slot_R, length_R = torch.tensor(slots, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int64)
        slot_T = slot_R.repeat_interleave(length_R)
        order_T = slot_T.argsort(stable=True)[int((slot_T < 0).sum()) :]
        counts_S = torch.bincount(slot_T[order_T]).tolist()
        segments = [(slot, count) for slot, count in enumerate(counts_S) if count]
        if len(order_T) > self.max_tokens or len(segments) > self.max_segments:
            raise ValueError(
                f"found {len(order_T)} tokens of {len(segments)} slots, "
                f"expected at most {self.max_tokens} of {self.max_segments}"
            )
        tiles: list[int] = []
        start = 0
        for slot, count in segments:
            for first in range(0, count, self.block_tokens):
                tiles += (slot, start + first, min(self.block_tokens, count - first), int(first == 0))
            start += count
        staged = torch.zeros(self._token_start + len(order_T), dtype=torch.int32)
        staged[self._tile_start : self._tile_start + len(tiles)] = torch.tensor(tiles, dtype=torch.int32)
        staged[self._token_start :] = order_T
        copy_to_device(self._buffer[: len(staged)], staged)


def copy_to_device(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy without waiting. Pinned memory is new each time: its allocator reuses it when the copy has been made."""
    target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)


def _block_rank(rank: int) -> int:
    """Ranks that one program multiplies at a time, for ranks up to ``rank``."""
    return min(max(1 << (rank - 1).bit_length(), _MIN_BLOCK), _MAX_BLOCK)


def _bits(value: float) -> int:
    """A float32 as the int32 of the same bits."""
    (bits,) = struct.unpack("<i", struct.pack("<f", value))
    return int(bits)
