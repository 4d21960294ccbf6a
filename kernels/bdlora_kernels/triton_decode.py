"""The fused kernel: shrink and expand in one launch."""

# Triton has no types for what is inside a kernel.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

import triton
import triton.language as tl

from bdlora_kernels.triton_expand import expand_tile
from bdlora_kernels.triton_shrink import load_tile, shrink_tile


@triton.jit
def _arrive(counter_ptr, arrival, all_arrivals):
    """Count this program, after all that it wrote; the last one leaves the counter zero for the next launch."""
    # All threads of the program have written before one of them counts.
    tl.debug_barrier()
    before = tl.atomic_add(counter_ptr, arrival, sem="acq_rel")
    if before + arrival == all_arrivals:
        tl.store(counter_ptr, 0)


@triton.jit
def fused_kernel(
    y_ptr,
    h_ptr,
    x_ptr,
    a_ptr,
    b_ptr,
    tiles_ptr,
    tokens_ptr,
    shrink_ptr,
    expand_ptr,
    counters_ptr,
    tiles,
    row_programs,
    outputs,
    y_stride,
    x_stride,
    a_stride,
    b_stride,
    h_split_stride,
    h_stride,
    shrink_stride,
    expand_stride,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SHRINK_BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    EXPAND_BLOCK_R: tl.constexpr,
):
    """What `shrink_kernel` and then `expand_kernel` do.

    The programs of the shrink have the lowest numbers, so they run or have run when one of the expand starts. Those
    fetch their part of B and y first, and then wait until the counter of their tile says that h is complete. The
    counter's low 16 bits count programs of the shrink, its high bits those of the expand. Grid: one dimension, for
    each tile (row programs times splits) programs, then for each tile (blocks of outputs) programs.
    """
    program = tl.program_id(0)
    shrink_programs = row_programs * SPLITS
    output_blocks = tl.cdiv(outputs, BLOCK_O)
    all_arrivals = shrink_programs + (output_blocks << 16)
    if program < tiles * shrink_programs:
        tile = program // shrink_programs
        slot, start, count = load_tile(tiles_ptr, tile)
        if count > 0:
            part = program % shrink_programs
            shrink_tile(h_ptr, x_ptr, a_ptr, tokens_ptr, shrink_ptr, slot, start, count, part // SPLITS,
                        row_programs, part % SPLITS, SPLITS, x_stride, a_stride, h_split_stride, h_stride,
                        shrink_stride, BLOCK_T, BLOCK_K, SHRINK_BLOCK_R)  # fmt: skip
            _arrive(counters_ptr + tile, 1, all_arrivals)
    else:
        part = program - tiles * shrink_programs
        tile = part // output_blocks
        slot, start, count = load_tile(tiles_ptr, tile)
        if count > 0:
            expand_tile(y_ptr, h_ptr, b_ptr, tokens_ptr, expand_ptr, slot, start, count, part % output_blocks, outputs,
                        y_stride, b_stride, h_split_stride, h_stride, expand_stride, counters_ptr + tile,
                        shrink_programs, SPLITS, BLOCK_T, BLOCK_O, EXPAND_BLOCK_R, "counter")  # fmt: skip
            _arrive(counters_ptr + tile, 1 << 16, all_arrivals)
