"""A module's delta as blocks of two thin factors, and the exact changes of the block count.

Block k of a column-parallel module gives output rows k, of a row-parallel one it reads input columns k:

    delta = vstack(B_k A_k)    side B (column-parallel)
    delta = hstack(B_k A_k)    side A (row-parallel)

so a plain LoRA is one block of either side. In both cases a block has one *split* factor, which belongs to the block's
own features (rows of B, columns of A), and one *shared* factor, which meets all features of the other side.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bdlora_sglang.adapter import Adapter, BlockSide, LoRAModule
from bdlora_sglang.errors import AdapterError


@dataclass(frozen=True)
class Block:
    """One block's delta is ``b @ a``: ``b`` is ``(block's outputs, rank)``, ``a`` is ``(rank, block's inputs)``."""

    b: torch.Tensor
    a: torch.Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def open_convertible(folder: str | Path) -> Adapter:
    """Open an adapter of linear modules and embeddings; raises `AdapterError` for another, as `Adapter.open` does."""
    adapter = Adapter.open(folder)
    if adapter.config.parameters:
        expected = "none: LoRA on parameters is served, and not converted"
        raise AdapterError(
            adapter.config.source, "field 'target_parameters'", ", ".join(adapter.config.parameters), expected
        )
    return adapter


def read_blocks(adapter: Adapter, module: LoRAModule) -> list[Block]:
    """Read a module's two tensors, in the stored type; raises `AdapterError` on NaN and infinity."""
    read = adapter.checkpoint.read
    shape_a, shape_b = (
        adapter.checkpoint.shape(module.tensor_a),
        adapter.checkpoint.shape(module.tensor_b),
    )
    a = read(module.tensor_a, range(shape_a[0]), range(shape_a[1]))
    b = read(module.tensor_b, range(shape_b[0]), range(shape_b[1]))
    chunks_b = b.chunk(module.nblocks, dim=0 if module.side is BlockSide.B else 1)
    return [Block(b_k, a_k) for b_k, a_k in zip(chunks_b, a.chunk(module.nblocks, dim=0), strict=True)]


def stored_factors(blocks: Sequence[Block], side: BlockSide) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """PEFT's stored ``lora_A`` and ``lora_B`` of the blocks, each as row chunks that lie below each other.

    Blocks of smaller rank are filled up with zeros, because PEFT stores blocks of one rank.
    """
    padded = with_equal_ranks(blocks)
    if side is BlockSide.B:
        return [block.a for block in padded], [block.b for block in padded]
    return [block.a for block in padded], [torch.cat([block.b for block in padded], dim=1)]


def with_equal_ranks(blocks: Sequence[Block]) -> list[Block]:
    """The blocks, filled up with zero ranks to the rank of the largest."""
    rank = max(block.rank for block in blocks)
    return [_pad(block, rank) for block in blocks]


def _pad(block: Block, rank: int) -> Block:
    if block.rank == rank:
        return block
    missing = rank - block.rank
    return Block(
        torch.cat([block.b, block.b.new_zeros(block.b.shape[0], missing)], dim=1),
        torch.cat([block.a, block.a.new_zeros(missing, block.a.shape[1])], dim=0),
    )


def exact_block_rank(module: LoRAModule, nblocks: int) -> int:
    """The rank of a block that `regroup` never exceeds: the source blocks that one new block can meet, all kept."""
    old = module.nblocks
    most = max(-(-(new + 1) * old // nblocks) - new * old // nblocks for new in range(nblocks))
    return module.block_rank * most


def regroup(blocks: Sequence[Block], side: BlockSide, nblocks: int) -> list[Block]:
    """The same delta in ``nblocks`` blocks, exactly: no number is computed, only copied.

    A new block inside an old one copies its shared factor and cuts its split factor; a new block that meets several
    old ones stacks their ranks. A rank that several old blocks repeat (as a lossless conversion makes them) is stacked
    once, and a rank of zeros is left out, so that going there and back gives the first factors again. Blocks that are
    zero altogether (an adapter before training) keep their rank.
    """
    if len(blocks) == nblocks:
        return list(blocks)
    pairs = [_split_shared(block, side) for block in blocks]
    size = sum(split.shape[0] for split, _ in pairs)
    old, new = size // len(pairs), size // nblocks
    nonzero = any(bool(split[0].any() or split.any()) for split, _ in pairs)
    regrouped = []
    for start in range(0, size, new):
        pieces = [
            (split[max(start - k * old, 0) : start + new - k * old], shared)
            for k, (split, shared) in enumerate(pairs)
            if k * old < start + new and start < (k + 1) * old
        ]
        split, shared = pieces[0] if len(pieces) == 1 else _stack(pieces)
        if nonzero:
            split, shared = _without_zero_ranks(split, shared)
        regrouped.append(Block(split, shared) if side is BlockSide.B else Block(shared.T, split.T))
    return regrouped


def _split_shared(block: Block, side: BlockSide) -> tuple[torch.Tensor, torch.Tensor]:
    """The block as split factor ``(own features, rank)`` and shared factor ``(rank, other features)``."""
    return (block.b, block.a) if side is BlockSide.B else (block.a.T, block.b.T)


def _stack(
    pieces: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pieces below each other in one block, ranks with the same shared row side by side in one column."""
    rows: list[torch.Tensor] = []
    ranks_of_row: dict[bytes, list[int]] = {}
    columns: list[list[int]] = []
    for _, shared in pieces:
        taken: list[int] = []
        for row in shared:
            known = ranks_of_row.setdefault(bytes(raw_bytes(row.contiguous())), [])
            rank = next((rank for rank in known if rank not in taken), None)
            if rank is None:
                rank = len(rows)
                rows.append(row)
                known.append(rank)
            taken.append(rank)
        columns.append(taken)
    stacked = pieces[0][0].new_zeros(sum(split.shape[0] for split, _ in pieces), len(rows))
    start = 0
    for (split, _), ranks in zip(pieces, columns, strict=True):
        stacked[start : start + split.shape[0], ranks] = split
        start += split.shape[0]
    return stacked, torch.stack(rows)


def _without_zero_ranks(split: torch.Tensor, shared: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if split[0].all():  # nearly always; looking at everything takes longer than writing it
        return split, shared
    used = split.any(dim=0)
    if used.all():
        return split, shared
    if not used.any():
        used[0] = True
    return split[:, used], shared[used]


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy. The view keeps the tensor alive."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    array = (ctypes.c_ubyte * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())
    array.owner = tensor  # type: ignore[attr-defined]  # from_address keeps no reference of its own
    return memoryview(array).cast("B")
