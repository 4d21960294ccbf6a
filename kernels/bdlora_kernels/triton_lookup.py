"""The shrink of an embedding: A is looked up by token ids, not multiplied with."""

# Triton has no types for what is inside a kernel.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

import triton
import triton.language as tl

from bdlora_kernels import tables
from bdlora_kernels.triton_shrink import load_tile

_ENTRY_FIELDS = tl.constexpr(tables.ENTRY_FIELDS)


@triton.jit(do_not_specialize=["first_id"])
def lookup_kernel(
    h_ptr,
    ids_ptr,
    a_ptr,
    tiles_ptr,
    tokens_ptr,
    entries_ptr,
    first_id,
    a_stride,
    h_stride,
    entries_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``h[t, h_start + r] = A[r, ids[t] - first_id]``

    for each token t in a tile and each entry ``(input_start, input_size, rank, a_offset, h_start)`` of its slot, with
    ``A[r, k] = a[slot, a_offset + r * input_size + k]``; 0 for tokens that are another rank's, before ``first_id`` or
    ``input_size`` and more behind it. Grid: (tiles,).
    """
    slot, start, count, _ = load_tile(tiles_ptr, tl.program_id(0))
    if count > 0:
        position_T = tl.arange(0, BLOCK_T)
        in_tile_T = position_T < count
        token_T = tl.load(tokens_ptr + start + position_T, mask=in_tile_T, other=0)
        column_T = tl.load(ids_ptr + token_T, mask=in_tile_T, other=-1).to(tl.int64) - first_id
        row_R = tl.arange(0, BLOCK_R)
        header_ptr = entries_ptr + slot * entries_stride
        for block in tl.range(0, tl.load(header_ptr), num_stages=1):
            entry_ptr = header_ptr + (1 + block) * _ENTRY_FIELDS
            input_size, rank = tl.load(entry_ptr + 1), tl.load(entry_ptr + 2)
            a_offset, h_start = tl.load(entry_ptr + 3), tl.load(entry_ptr + 4)
            own_T = in_tile_T & (column_T >= 0) & (column_T < input_size)
            in_rank_R = row_R < rank
            slot_a_ptr = a_ptr + slot.to(tl.int64) * a_stride + a_offset
            a_ptrs = slot_a_ptr + row_R[None, :] * input_size + column_T[:, None]
            a_TR = tl.load(a_ptrs, mask=own_T[:, None] & in_rank_R[None, :], other=0.0)
            h_ptrs = h_ptr + (token_T * h_stride + h_start)[:, None] + row_R[None, :]
            tl.store(h_ptrs, a_TR.to(tl.float32), mask=in_tile_T[:, None] & in_rank_R[None, :])
