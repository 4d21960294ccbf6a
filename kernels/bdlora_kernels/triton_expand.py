"""The expand kernel: shrink output times B, added into the base output."""

# Triton has no types for what is inside a kernel.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

import triton
import triton.language as tl

from bdlora_kernels import tables
from bdlora_kernels.triton_shrink import load_tile

_ENTRY_FIELDS = tl.constexpr(tables.ENTRY_FIELDS)
# Columns of B that are summed up on their own where loads cannot be wide.
_COLUMNS = tl.constexpr(16)
# The numbers of so many tokens are loaded ahead.
_FEW_TOKENS = tl.constexpr(8)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _multiply(b_OR, h_RT, delta_OT):
    """``delta + b @ h`` on tensor cores, with a float32 h as exact as two 16-bit products make it.

    h goes in as the nearest number of B's type, and as the nearest to the rest: one number alone would cost half a
    rounding of the result, and TF32 operands are cut off, not rounded, by the hardware.
    """
    element: tl.constexpr = b_OR.dtype
    if element == tl.float32:
        delta_OT = tl.dot(b_OR, h_RT, delta_OT, input_precision="ieee")
    elif element == tl.float16:
        # float16 has no exponents to spare: bring each token's largest element to between 1 and 2, exactly.
        largest_T = tl.max(tl.abs(h_RT), axis=0)
        exponent_T = largest_T.to(tl.int32, bitcast=True) & 0x7F800000
        unit_T = exponent_T.to(tl.float32, bitcast=True)
        inverse_T = ((254 << 23) - exponent_T).to(tl.float32, bitcast=True)
        h_RT *= inverse_T[None, :]
        high_RT = h_RT.to(element)
        low_RT = (h_RT - high_RT.to(tl.float32)).to(element)
        product_OT = tl.dot(b_OR, low_RT)
        delta_OT += unit_T[None, :] * tl.dot(b_OR, high_RT, product_OT)
    else:
        high_RT = h_RT.to(element)
        low_RT = (h_RT - high_RT.to(tl.float32)).to(element)
        if _INTERPRETED:
            # The interpreter would multiply the integers that bfloat16 is stored in.
            high_RT, low_RT, b_OR = high_RT.to(tl.float32), low_RT.to(tl.float32), b_OR.to(tl.float32)
        delta_OT = tl.dot(b_OR, low_RT, delta_OT)
        delta_OT = tl.dot(b_OR, high_RT, delta_OT)
    return delta_OT


@triton.jit
def _column_of_h(column, rank, h_rank_stride, GATHERED: tl.constexpr):
    """Where what B's ``column`` is multiplied with stands in h, which has as many of them from each TP rank."""
    if GATHERED > 1:
        own_rank = rank // GATHERED
        column = column // own_rank * h_rank_stride + column % own_rank
    return column


@triton.jit
def _add_slice(
    delta_OT,
    h_ptr,
    h_T,  # where the tokens' rows are, at the slice's first column
    b_ptr,  # the slice's
    in_tile_T,
    o_O,  # outputs, counted from the slice's first
    output_size,
    rank,
    h_rank_stride,
    scaling,
    WIDTH: tl.constexpr,
    GATHERED: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``delta += scaling * B @ h.T``; ``WIDTH`` divides B's rank, and the compiler sees it."""
    rank = rank // WIDTH * WIDTH
    b_O = b_ptr + o_O * rank
    inside_O = (o_O >= 0) & (o_O < output_size)
    for start in tl.range(0, rank, BLOCK_R, num_stages=1):
        r_R = start + tl.arange(0, BLOCK_R)
        b_OR = tl.load(b_O[:, None] + r_R[None, :], mask=inside_O[:, None] & (r_R < rank)[None, :], other=0.0)
        # From the second-level cache: another multiprocessor wrote it.
        h_ptrs = h_ptr + h_T[None, :] + _column_of_h(r_R, rank, h_rank_stride, GATHERED)[:, None]
        h_RT = tl.load(h_ptrs, mask=(r_R < rank)[:, None] & in_tile_T[None, :], other=0.0, cache_modifier=".cg")
        delta_OT = _multiply(b_OR, h_RT.to(tl.float32) * scaling, delta_OT)
    return delta_OT


@triton.jit
def _add_odd_slice(
    delta_OT,
    h_ptr,
    h_T,
    b_ptr,
    in_tile_T,
    o_O,
    output_size,
    rank,
    h_rank_stride,
    scaling,
    GATHERED: tl.constexpr,
):
    """The same for any rank, a column of B after the other: slow and small. A few columns are summed on their own, so
    that a large rank's sum does not lose more than the tensor cores' does."""
    inside_O = (o_O >= 0) & (o_O < output_size)
    for start in tl.range(0, rank, _COLUMNS, num_stages=1):
        sum_OT = tl.zeros_like(delta_OT)
        for column in tl.range(start, tl.minimum(start + _COLUMNS, rank), num_stages=1):
            b_O = tl.load(b_ptr + o_O * rank + column, mask=inside_O, other=0.0).to(tl.float32)
            h_ptrs = h_ptr + h_T + _column_of_h(column, rank, h_rank_stride, GATHERED)
            column_T = tl.load(h_ptrs, mask=in_tile_T, other=0.0, cache_modifier=".cg")
            sum_OT += b_O[:, None] * (column_T.to(tl.float32) * scaling)[None, :]
        delta_OT += sum_OT
    return delta_OT


@triton.jit(do_not_specialize=["h_rank_stride"])
def expand_kernel(
    y_ptr,
    h_ptr,
    b_ptr,
    tiles_ptr,
    tokens_ptr,
    entries_ptr,
    outputs,
    y_stride,
    b_stride,
    h_stride,
    h_rank_stride,
    entries_stride,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
    GATHERED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """``y[t, output_start + o] += sum(scaling * h[t, h_start + r] * B[o, r] for r)``

    for each token t in a tile and each entry ``(output_start, output_size, rank, b_offset, h_start, scaling)`` of its
    slot, with ``B[o, r] = b[slot, b_offset + o * rank + r]``. Slices that write the same output are added in float32,
    and y is rounded once. Of h from ``GATHERED`` TP ranks, ``h_rank_stride`` elements apart, each has its share of the
    columns. ``BLOCK_T`` tokens of a tile are done at a time: outputs are the rows of the product, so that 8 tokens fill
    a tensor core. Grid: (blocks of outputs, tiles).
    """
    block = tl.program_id(0)
    slot, start, count, _ = load_tile(tiles_ptr, tl.program_id(1))
    if PDL:
        tl.extra.cuda.gdc_wait()
    if count > 0:
        header_ptr = entries_ptr + slot * entries_stride
        num_slices, entry_ptr = tl.load(header_ptr), header_ptr + _ENTRY_FIELDS
        position_T = tl.arange(0, BLOCK_T)
        # Beside the entries, not behind them, as neither tells where the other is. Large tiles of older architectures,
        # which have no PDL either, lack the registers.
        ahead: tl.constexpr = PDL or BLOCK_T <= _FEW_TOKENS
        if ahead:
            token_T = tl.load(tokens_ptr + start + position_T, mask=position_T < count, other=0)
        first_output = block * BLOCK_O
        o_O = first_output + tl.arange(0, BLOCK_O)
        # The first entry that writes here, by one step of loads; what the others hold is then in the first-level cache.
        e_E = tl.arange(0, ENTRIES)
        start_E = tl.load(entry_ptr + e_E * _ENTRY_FIELDS)
        size_E = tl.load(entry_ptr + e_E * _ENTRY_FIELDS + 1)
        writes_E = (start_E < first_output + BLOCK_O) & (start_E + size_E > first_output)
        first_slice = tl.min(tl.where(writes_E, e_E, ENTRIES))
        slot_b_ptr = b_ptr + slot.to(tl.int64) * b_stride
        for first_token in tl.range(0, count, BLOCK_T, num_stages=1):
            in_tile_T = first_token + position_T < count
            if not ahead:
                token_T = tl.load(tokens_ptr + start + first_token + position_T, mask=in_tile_T, other=0)
            y_ptrs = y_ptr + token_T.to(tl.int64)[None, :] * y_stride + o_O[:, None]
            y_mask = (o_O < outputs)[:, None] & in_tile_T[None, :]
            y_OT = tl.load(y_ptrs, mask=y_mask, other=0.0)
            delta_OT = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
            touched = 0
            for index in range(first_slice, num_slices):
                slice_ptr = entry_ptr + index * _ENTRY_FIELDS
                output_start, output_size = tl.load(slice_ptr), tl.load(slice_ptr + 1)
                rank, b_offset = tl.load(slice_ptr + 2), tl.load(slice_ptr + 3)
                h_start = tl.load(slice_ptr + 4)
                scaling = tl.load(slice_ptr + 5).to(tl.float32, bitcast=True)
                if (output_start < first_output + BLOCK_O) & (output_start + output_size > first_output):
                    touched = 1
                    h_T = token_T * h_stride + h_start
                    if (rank | b_offset) % WIDTH == 0:
                        slice_b_ptr = slot_b_ptr + b_offset // WIDTH * WIDTH
                        delta_OT = _add_slice(delta_OT, h_ptr, h_T, slice_b_ptr, in_tile_T, o_O - output_start,
                                              output_size, rank, h_rank_stride, scaling,
                                              WIDTH, GATHERED, BLOCK_R)  # fmt: skip
                    else:
                        delta_OT = _add_odd_slice(delta_OT, h_ptr, h_T, slot_b_ptr + b_offset, in_tile_T,
                                                  o_O - output_start, output_size, rank, h_rank_stride, scaling,
                                                  GATHERED)  # fmt: skip
            if touched == 1:
                tl.store(y_ptrs, (y_OT.to(tl.float32) + delta_OT).to(y_ptr.dtype.element_ty), mask=y_mask)
            if ahead:
                next_T = first_token + BLOCK_T + position_T
                token_T = tl.load(tokens_ptr + start + next_T, mask=next_T < count, other=0)
