"""The shrink kernel: tokens times A, in partial sums over the inputs."""

# Triton has no types for what is inside a kernel.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

import triton
import triton.language as tl

from bdlora_kernels import tables

_TILE_FIELDS = tl.constexpr(tables.TILE_FIELDS)
_ENTRY_FIELDS = tl.constexpr(tables.ENTRY_FIELDS)
# Elements of one 16-byte load in 16-bit types.
_WIDE = tl.constexpr(8)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def load_tile(tiles_ptr, tile):
    """``(slot, start, count)`` of a tile of tokens; a tile that is not in use has no tokens."""
    ptr = tiles_ptr + tile * _TILE_FIELDS
    return tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2)


@triton.jit
def slot_entries(entries_ptr, slot, entries_stride):
    """The number of a slot's entries, and where the first stands."""
    header_ptr = entries_ptr + slot * entries_stride
    return tl.load(header_ptr), header_ptr + _ENTRY_FIELDS


@triton.jit
def _multiply_block(
    h_ptr,  # this partial sum's
    x_ptr,
    a_ptr,  # this slot's
    token_T,
    in_tile_T,
    x_stride,
    h_stride,
    split,
    splits,
    input_start,
    input_size,
    rank,
    a_offset,
    h_start,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One block of rows for one tile; ``WIDTH`` divides the offsets and sizes, and the compiler sees it."""
    input_start = input_start // WIDTH * WIDTH
    input_size = input_size // WIDTH * WIDTH
    a_offset = a_offset // WIDTH * WIDTH
    row_R = tl.arange(0, BLOCK_R)
    x_T = x_ptr + token_T.to(tl.int64) * x_stride + input_start
    a_R = a_ptr + a_offset + row_R * input_size
    split_size = tl.cdiv(input_size, splits * BLOCK_K) * BLOCK_K
    first = split * split_size
    h_TR = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(first, tl.minimum(first + split_size, input_size), BLOCK_K):
        k_K = start + tl.arange(0, BLOCK_K)
        inside_K = k_K < input_size
        x_TK = tl.load(x_T[:, None] + k_K[None, :], mask=in_tile_T[:, None] & inside_K[None, :], other=0.0)
        a_KR = tl.load(a_R[None, :] + k_K[:, None], mask=(row_R < rank)[None, :] & inside_K[:, None], other=0.0)
        if _INTERPRETED:
            # The interpreter would multiply the integers that bfloat16 is stored in.
            x_TK, a_KR = x_TK.to(tl.float32), a_KR.to(tl.float32)
        h_TR = tl.dot(x_TK, a_KR, h_TR, input_precision="ieee")
    h_ptrs = h_ptr + (token_T * h_stride + h_start)[:, None] + row_R[None, :]
    tl.store(h_ptrs, h_TR, mask=in_tile_T[:, None] & (row_R < rank)[None, :])


@triton.jit
def shrink_tile(
    h_ptr,
    x_ptr,
    a_ptr,
    tokens_ptr,
    entries_ptr,
    slot,
    start,
    count,
    program,
    programs,
    split,
    splits,
    x_stride,
    a_stride,
    h_split_stride,
    h_stride,
    entries_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """What one program does: of the slot's blocks of rows of A each ``programs``-th, split ``split`` of the inputs."""
    num_blocks, entries_ptr = slot_entries(entries_ptr, slot, entries_stride)
    if program < num_blocks:
        position_T = tl.arange(0, BLOCK_T)
        in_tile_T = position_T < count
        token_T = tl.load(tokens_ptr + start + position_T, mask=in_tile_T, other=0)
        slot_a_ptr = a_ptr + slot.to(tl.int64) * a_stride
        split_h_ptr = h_ptr + split.to(tl.int64) * h_split_stride
        for block in tl.range(program, num_blocks, programs, num_stages=1):
            entry_ptr = entries_ptr + block * _ENTRY_FIELDS
            input_start, input_size = tl.load(entry_ptr), tl.load(entry_ptr + 1)
            rank, a_offset, h_start = tl.load(entry_ptr + 2), tl.load(entry_ptr + 3), tl.load(entry_ptr + 4)
            if (input_start | input_size | a_offset) % _WIDE == 0:
                _multiply_block(split_h_ptr, x_ptr, slot_a_ptr, token_T, in_tile_T, x_stride, h_stride, split, splits,
                                input_start, input_size, rank, a_offset, h_start,
                                _WIDE, BLOCK_T, BLOCK_K, BLOCK_R)  # fmt: skip
            else:
                _multiply_block(split_h_ptr, x_ptr, slot_a_ptr, token_T, in_tile_T, x_stride, h_stride, split, splits,
                                input_start, input_size, rank, a_offset, h_start,
                                1, BLOCK_T, BLOCK_K, BLOCK_R)  # fmt: skip


@triton.jit
def shrink_kernel(
    h_ptr,
    x_ptr,
    a_ptr,
    tiles_ptr,
    tokens_ptr,
    entries_ptr,
    x_stride,
    a_stride,
    h_split_stride,
    h_stride,
    entries_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """``h[p, t, h_start + r] = sum(x[t, input_start + k] * A[r, k] for k in split p)``

    for each token t in a tile and each entry ``(input_start, input_size, rank, a_offset, h_start)`` of its slot, with
    ``A[r, k] = a[slot, a_offset + r * input_size + k]``. Every split of an entry is written, an empty one with zeros;
    other elements of h are not touched. Grid: (tiles, programs that share the blocks of rows, splits).
    """
    if PDL:
        # The expand kernel may be set up now; it waits for this one before it reads h.
        tl.extra.cuda.gdc_launch_dependents()
    slot, start, count = load_tile(tiles_ptr, tl.program_id(0))
    if count > 0:
        shrink_tile(h_ptr, x_ptr, a_ptr, tokens_ptr, entries_ptr, slot, start, count, tl.program_id(1),
                    tl.num_programs(1), tl.program_id(2), tl.num_programs(2), x_stride, a_stride, h_split_stride,
                    h_stride, entries_stride, BLOCK_T, BLOCK_K, BLOCK_R)  # fmt: skip
