"""The shrink kernel: tokens times A."""

# Triton has no types for what is inside a kernel.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

import triton
import triton.language as tl

from bdlora_kernels import tables

_TILE_FIELDS = tl.constexpr(tables.TILE_FIELDS)
_ENTRY_FIELDS = tl.constexpr(tables.ENTRY_FIELDS)
# Elements of one 16-byte load in 16-bit types.
_WIDE = tl.constexpr(8)
# Inputs at a time where loads cannot be wide: few, so that they set no kernel's registers.
_NARROW_BLOCK_K = tl.constexpr(32)
# What the second-level cache fetches at a time.
_SECTOR_BYTES = tl.constexpr(32)
_SECTORS_AT_ONCE = tl.constexpr(128)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def load_tile(tiles_ptr, tile):
    """``(slot, start, count, is_first)`` of a tile of tokens; a tile that is not in use has no tokens."""
    ptr = tiles_ptr + tile * _TILE_FIELDS
    return tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3)


@triton.jit
def _prefetch(address_N):
    """Ask for the sectors at these addresses to be brought into the second-level cache; nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address_N], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _prefetch_b(first_ptr, elements, part, parts):
    """Share ``part`` of so many elements. An address beyond the last is that of the last again."""
    sectors = tl.cdiv(elements * (first_ptr.dtype.element_ty.primitive_bitwidth // 8), _SECTOR_BYTES)
    start = first_ptr.to(tl.int64)
    for first in range(part * _SECTORS_AT_ONCE, sectors, parts * _SECTORS_AT_ONCE):
        sector_N = tl.minimum(first + tl.arange(0, _SECTORS_AT_ONCE), sectors - 1)
        _prefetch(start + sector_N.to(tl.int64) * _SECTOR_BYTES)


@triton.jit
def _multiply_block(
    target_ptr,
    x_ptr,
    a_ptr,  # this slot's
    token_T,
    in_tile_T,
    x_stride,
    h_stride,
    split,
    input_start,
    input_size,
    rank,
    a_offset,
    h_start,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One block of rows for one tile; ``WIDTH`` divides the offsets and sizes, and the compiler sees it."""
    input_start = input_start // WIDTH * WIDTH
    input_size = input_size // WIDTH * WIDTH
    a_offset = a_offset // WIDTH * WIDTH
    row_R = tl.arange(0, BLOCK_R)
    x_T = x_ptr + token_T.to(tl.int64) * x_stride + input_start
    a_R = a_ptr + a_offset + row_R * input_size
    split_size = tl.cdiv(input_size, SPLITS * BLOCK_K) * BLOCK_K
    first = split * split_size
    h_TR = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in tl.range(first, tl.minimum(first + split_size, input_size), BLOCK_K, num_stages=STAGES):
        k_K = start + tl.arange(0, BLOCK_K)
        inside_K = k_K < input_size
        x_TK = tl.load(x_T[:, None] + k_K[None, :], mask=in_tile_T[:, None] & inside_K[None, :], other=0.0)
        a_KR = tl.load(a_R[None, :] + k_K[:, None], mask=(row_R < rank)[None, :] & inside_K[:, None], other=0.0)
        if _INTERPRETED:
            # The interpreter would multiply the integers that bfloat16 is stored in.
            x_TK, a_KR = x_TK.to(tl.float32), a_KR.to(tl.float32)
        h_TR = tl.dot(x_TK, a_KR, h_TR, input_precision="ieee")
    target_ptrs = target_ptr + (token_T * h_stride + h_start)[:, None] + row_R[None, :]
    tl.store(target_ptrs, h_TR, mask=in_tile_T[:, None] & (row_R < rank)[None, :])


@triton.jit
def _sum_block(
    h_ptr,
    partial_ptr,
    token_T,
    in_tile_T,
    h_stride,
    partial_stride,
    rank,
    h_start,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``h[:, rows] = partial[:, :, rows].sum(0)``, in order: the same bits whichever program arrives last."""
    row_R = tl.arange(0, BLOCK_R)
    offset_TR = (token_T * h_stride + h_start)[:, None] + row_R[None, :]
    mask_TR = in_tile_T[:, None] & (row_R < rank)[None, :]
    h_TR = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for split in tl.static_range(SPLITS):
        # From the second-level cache: other multiprocessors wrote them.
        plane_ptrs = partial_ptr + split * partial_stride + offset_TR
        h_TR += tl.load(plane_ptrs, mask=mask_TR, other=0.0, cache_modifier=".cg")
    tl.store(h_ptr + offset_TR, h_TR, mask=mask_TR)


@triton.jit(do_not_specialize=["partial_stride"])
def shrink_kernel(
    h_ptr,
    partial_ptr,
    counters_ptr,
    x_ptr,
    a_ptr,
    b_ptr,
    tiles_ptr,
    tokens_ptr,
    entries_ptr,
    expand_entries_ptr,
    x_stride,
    a_stride,
    b_stride,
    h_stride,
    partial_stride,
    entries_stride,
    expand_entries_stride,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    ENTRIES: tl.constexpr,
    PREFETCH: tl.constexpr,
    PREFETCH_B: tl.constexpr,
    PDL: tl.constexpr,
):
    """``h[t, h_start + r] = sum(x[t, input_start + k] * A[r, k] for k)``

    for each token t in a tile and each entry ``(input_start, input_size, rank, a_offset, h_start)`` of its slot, with
    ``A[r, k] = a[slot, a_offset + r * input_size + k]``; other elements of h are not touched. Grid: (tiles, programs
    that share the blocks of rows, splits). With more than one split each writes ``partial[split]`` of the same shape
    as h, and the last to arrive, by the tile's counter, adds them up and leaves the counter zero. With ``PREFETCH``
    the slot's first ``ENTRIES`` rows in the table of the expand go to the second-level cache, and with ``PREFETCH_B``
    its B.
    """
    if PDL:
        # The expand kernel may be set up now; it waits for this one before it reads h.
        tl.extra.cuda.gdc_launch_dependents()
    tile, program, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    programs = tl.num_programs(1)
    slot, start, count, is_first = load_tile(tiles_ptr, tile)
    if count > 0:
        position_T = tl.arange(0, BLOCK_T)
        in_tile_T = position_T < count
        token_T = tl.load(tokens_ptr + start + position_T, mask=in_tile_T, other=0)
        header_ptr = entries_ptr + slot * entries_stride
        num_blocks, b_first, b_elements = tl.load(header_ptr), tl.load(header_ptr + 1), tl.load(header_ptr + 2)
        entry_ptr = header_ptr + (1 + program) * _ENTRY_FIELDS
        # There are as many entries as programs, so the first is there to be loaded before we know that it is in use.
        input_start, input_size = tl.load(entry_ptr), tl.load(entry_ptr + 1)
        rank, a_offset, h_start = tl.load(entry_ptr + 2), tl.load(entry_ptr + 3), tl.load(entry_ptr + 4)
        # Always true: the compiler would else load the entry behind the branch, one more step after the header.
        loaded = (input_start | input_size | rank | a_offset | h_start) >= 0
        if (program < num_blocks) & loaded:
            slot_a_ptr = a_ptr + slot.to(tl.int64) * a_stride
            target_ptr = h_ptr if SPLITS == 1 else partial_ptr + split.to(tl.int64) * partial_stride
            for block in tl.range(program, num_blocks, programs, num_stages=1):
                if (input_start | input_size | a_offset) % _WIDE == 0:
                    _multiply_block(target_ptr, x_ptr, slot_a_ptr, token_T, in_tile_T, x_stride, h_stride, split,
                                    input_start, input_size, rank, a_offset, h_start,
                                    _WIDE, SPLITS, BLOCK_T, BLOCK_K, BLOCK_R, STAGES)  # fmt: skip
                else:
                    _multiply_block(target_ptr, x_ptr, slot_a_ptr, token_T, in_tile_T, x_stride, h_stride, split,
                                    input_start, input_size, rank, a_offset, h_start,
                                    1, SPLITS, BLOCK_T, _NARROW_BLOCK_K, BLOCK_R, 1)  # fmt: skip
                if block + programs < num_blocks:
                    entry_ptr += programs * _ENTRY_FIELDS
                    input_start, input_size = tl.load(entry_ptr), tl.load(entry_ptr + 1)
                    rank, a_offset, h_start = tl.load(entry_ptr + 2), tl.load(entry_ptr + 3), tl.load(entry_ptr + 4)
            if PREFETCH and not _INTERPRETED:  # noqa: SIM102 - decided by the compiler, the next one when it runs
                if is_first == 1:
                    if PREFETCH_B:
                        first_b_ptr = b_ptr + slot.to(tl.int64) * b_stride + b_first
                        _prefetch_b(first_b_ptr, b_elements, program * SPLITS + split, programs * SPLITS)
                    entries = (expand_entries_ptr + slot * expand_entries_stride).to(tl.int64)
                    _prefetch(entries + tl.arange(0, ENTRIES) * _SECTOR_BYTES)
            if SPLITS > 1:
                counter_ptr = counters_ptr + tile * programs + program
                # All threads of the program have written before one of them counts.
                tl.debug_barrier()
                if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == SPLITS - 1:
                    for block in tl.range(program, num_blocks, programs, num_stages=1):
                        entry_ptr = header_ptr + (1 + block) * _ENTRY_FIELDS
                        rank, h_start = tl.load(entry_ptr + 2), tl.load(entry_ptr + 4)
                        _sum_block(h_ptr, partial_ptr, token_T, in_tile_T, h_stride, partial_stride, rank, h_start,
                                   SPLITS, BLOCK_T, BLOCK_R)  # fmt: skip
                    tl.store(counter_ptr, 0)
