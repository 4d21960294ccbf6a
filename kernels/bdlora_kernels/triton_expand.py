"""The expand kernel: shrink output times B, added into the base output."""

# Triton has no types for what is inside a kernel.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

import triton
import triton.language as tl

from bdlora_kernels import tables
from bdlora_kernels.triton_shrink import load_tile, slot_entries

_ENTRY_FIELDS = tl.constexpr(tables.ENTRY_FIELDS)
# Elements of one 16-byte load in 16-bit types.
_WIDE = tl.constexpr(8)


@triton.jit
def wait_for_shrink(waited, counter_ptr, shrink_programs, WAIT: tl.constexpr):
    """Return 1 when ``h`` may be read: at once ("none"), after the kernel before ("kernel"), or when the low half of
    the counter says that so many programs of this launch have written it ("counter")."""
    if WAIT == "kernel":
        tl.extra.cuda.gdc_wait()
    if WAIT == "counter":  # noqa: SIM102 - this is decided by the compiler, the next one when it runs
        if waited == 0:
            while (tl.atomic_add(counter_ptr, 0, sem="acquire") & 0xFFFF) < shrink_programs:
                pass
    return 1


@triton.jit
def _add_slice(
    delta_TO,
    h_ptr,
    h_T,  # where the tokens' rows are, at the slice's first column
    b_ptr,  # the slice's
    in_tile_T,
    o_O,  # outputs, counted from the slice's first
    output_size,
    rank,
    b_row_size,
    h_split_stride,
    scaling,
    waited,
    counter_ptr,
    shrink_programs,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WAIT: tl.constexpr,
):
    """``delta += scaling * h @ B.T``; ``WIDTH`` divides B's rank and row size, and the compiler sees it."""
    rank = rank // WIDTH * WIDTH
    b_O = b_ptr + o_O * (b_row_size // WIDTH * WIDTH)
    inside_O = (o_O >= 0) & (o_O < output_size)
    for start in tl.range(0, rank, BLOCK_R, num_stages=1):
        r_R = start + tl.arange(0, BLOCK_R)
        b_RO = tl.load(b_O[None, :] + r_R[:, None], mask=(r_R < rank)[:, None] & inside_O[None, :], other=0.0)
        # B is on its way while we wait.
        waited = wait_for_shrink(waited, counter_ptr, shrink_programs, WAIT)
        h_TR = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for split in tl.static_range(SPLITS):
            h_ptrs = (h_ptr + split * h_split_stride) + (h_T[:, None] + r_R[None, :])
            # From the second-level cache: another multiprocessor wrote it.
            h_TR += tl.load(h_ptrs, mask=in_tile_T[:, None] & (r_R < rank)[None, :], other=0.0, cache_modifier=".cg")
        # TF32 holds a 16-bit B exactly, and keeps more of h than 16 bits would.
        PRECISION: tl.constexpr = "ieee" if b_ptr.dtype.element_ty == tl.float32 else "tf32"
        delta_TO = tl.dot(h_TR * scaling, b_RO.to(tl.float32), delta_TO, input_precision=PRECISION)
    return delta_TO, waited


@triton.jit
def expand_tile(
    y_ptr,
    h_ptr,
    b_ptr,
    tokens_ptr,
    entries_ptr,
    slot,
    start,
    count,
    block,
    outputs,
    y_stride,
    b_stride,
    h_split_stride,
    h_stride,
    entries_stride,
    counter_ptr,
    shrink_programs,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WAIT: tl.constexpr,
):
    """What one program does: block ``block`` of the outputs, with each slice of the slot that writes there."""
    num_slices, entry_ptr = slot_entries(entries_ptr, slot, entries_stride)
    if num_slices > 0:
        position_T = tl.arange(0, BLOCK_T)
        in_tile_T = position_T < count
        token_T = tl.load(tokens_ptr + start + position_T, mask=in_tile_T, other=0)
        first = block * BLOCK_O
        o_O = first + tl.arange(0, BLOCK_O)
        y_ptrs = y_ptr + token_T.to(tl.int64)[:, None] * y_stride + o_O[None, :]
        y_mask = in_tile_T[:, None] & (o_O < outputs)[None, :]
        y_TO = tl.load(y_ptrs, mask=y_mask, other=0.0)
        delta_TO = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
        touched = 0
        waited = 0
        for _ in range(num_slices):
            output_start, output_size = tl.load(entry_ptr), tl.load(entry_ptr + 1)
            if (output_start < first + BLOCK_O) & (output_start + output_size > first):
                touched = 1
                rank, b_row_size = tl.load(entry_ptr + 2), tl.load(entry_ptr + 3)
                b_offset, h_start = tl.load(entry_ptr + 4), tl.load(entry_ptr + 5)
                scaling = tl.load(entry_ptr + 6).to(tl.float32, bitcast=True)
                slice_b_ptr = b_ptr + slot.to(tl.int64) * b_stride
                h_T = token_T * h_stride + h_start
                if (rank | b_row_size | b_offset) % _WIDE == 0:
                    delta_TO, waited = _add_slice(
                        delta_TO, h_ptr, h_T, slice_b_ptr + b_offset // _WIDE * _WIDE, in_tile_T, o_O - output_start,
                        output_size, rank, b_row_size, h_split_stride, scaling, waited, counter_ptr, shrink_programs,
                        SPLITS, _WIDE, BLOCK_T, BLOCK_R, WAIT)  # fmt: skip
                else:
                    delta_TO, waited = _add_slice(
                        delta_TO, h_ptr, h_T, slice_b_ptr + b_offset, in_tile_T, o_O - output_start,
                        output_size, rank, b_row_size, h_split_stride, scaling, waited, counter_ptr, shrink_programs,
                        SPLITS, 1, BLOCK_T, BLOCK_R, WAIT)  # fmt: skip
            entry_ptr += _ENTRY_FIELDS
        if touched == 1:
            tl.store(y_ptrs, (y_TO.to(tl.float32) + delta_TO).to(y_ptr.dtype.element_ty), mask=y_mask)


@triton.jit
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
    h_split_stride,
    h_stride,
    entries_stride,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """``y[t, output_start + o] += sum(scaling * sum(h[p, t, h_start + r] for p) * B[o, r] for r)``

    for each token t in a tile and each entry ``(output_start, output_size, rank, b_row_size, b_offset, h_start,
    scaling)`` of its slot, with ``B[o, r] = b[slot, b_offset + o * b_row_size + r]``. Slices that write the same output
    are added in float32, and y is rounded once. Grid: (tiles, blocks of outputs).
    """
    slot, start, count = load_tile(tiles_ptr, tl.program_id(0))
    if count > 0:
        WAIT: tl.constexpr = "kernel" if PDL else "none"
        expand_tile(y_ptr, h_ptr, b_ptr, tokens_ptr, entries_ptr, slot, start, count, tl.program_id(1), outputs,
                    y_stride, b_stride, h_split_stride, h_stride, entries_stride, tiles_ptr, 0,
                    SPLITS, BLOCK_T, BLOCK_O, BLOCK_R, WAIT)  # fmt: skip
    if PDL:
        # Also where there was nothing to add: what runs after this kernel takes the shrink to be over.
        tl.extra.cuda.gdc_wait()
