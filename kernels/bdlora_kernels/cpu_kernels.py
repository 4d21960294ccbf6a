"""Shrink and expand for a few tokens an adapter, compiled by Numba: each factor is read once, from where it stands.

PyTorch has batched products alone for this, and around them copies of x and y in the order of the slots: 1.7 times the
time. A kernel runs on PyTorch's own OpenMP threads, each of which takes a part of the columns of h or y: no thread
writes what another does, and a token's result depends neither on the batch around it nor on the threads. Factors are
read in the order in which they stand: several rows side by side are short runs for the memory, and take 1.2 to 2 times
as long.
"""

from typing import Any

import numpy as np
from numba import carray, njit

from bdlora_kernels.compiled import FASTMATH, Loop, barrier, floats, halves, integers, narrow, part, pointer, widen
from bdlora_kernels.lanes import LANES, add_product, load, total, zeros
from bdlora_kernels.layout import ENTRY, SEGMENT

# What a kernel reads, addresses and sizes in elements: `SEGMENT` (segments), int64 (places), `ENTRY` (slots, capacity),
# int64 (slots), the factors (slots, a_size or b_size), h in float32 (gathered, tokens, h_size), and x and y (tokens,
# x_stride or y_stride), of which outputs count, of the factors' type: float32, or bfloat16 of 2 bytes.
ARGUMENTS = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("segments", "num_segments", "places", "num_places", "entries", "counts", "num_slots", "capacity"),
            *("a", "a_size", "b", "b_size", "item_bytes", "h", "gathered", "num_tokens", "h_size"),
            *("x", "x_stride", "y", "y_stride", "outputs"),
        )
    ]
)

# Columns of y that are added up at a time: B's rows are read in long runs, and the sums stay in the L1 cache.
_BLOCK_OUTPUTS = 8192
# Columns of y: a thread takes whole cache lines of float32. Of h, which is little, as even a share as there is.
_LINE = 16
# From so many tokens of a slot on, arithmetic is what takes the time, and four rows of A share what is read of x.
_MANY_TOKENS = 3


@njit  # type: ignore[untyped-decorator]
def _tables(args: Any) -> Any:
    """The batch's segments and the places of their tokens; the slots' slices, and how many each slot has."""
    segments = carray(pointer(args.segments), (args.num_segments,), SEGMENT)
    places = integers(args.places, args.num_places)
    entries = carray(pointer(args.entries), (args.num_slots, args.capacity), ENTRY)
    counts = integers(args.counts, args.num_slots)
    return segments, places, entries, counts


@njit  # type: ignore[untyped-decorator]
def _rest(x_I: Any, a_I: Any, start: int, stop: int) -> Any:
    """What the last inputs, too few for all lanes, add to a sum."""
    rest = np.float32(0)
    for i in range(start, stop):
        rest += widen(x_I[i]) * widen(a_I[i])
    return rest


@njit  # type: ignore[untyped-decorator]
def _shrink(args: Any, x: Any, a_E: Any) -> None:
    """``h[0, t, h_start + r] = x[t, inputs] @ A[r]`` for the tokens t of each segment and the slices of its slot."""
    segments, places, entries, counts = _tables(args)
    h = floats(args.h, args.num_tokens * args.h_size)
    for segment in segments:
        if counts[segment.slot] == 0:
            continue
        last_entry = entries[segment.slot, counts[segment.slot] - 1]
        first, last = part(last_entry.h_start + last_entry.rank, 1)
        for p in range(counts[segment.slot]):
            entry = entries[segment.slot, p]
            size = entry.input_size
            whole = size // LANES * LANES
            row, stop = max(first - entry.h_start, 0), min(last - entry.h_start, entry.rank)
            while row < stop:
                a_0 = a_E[segment.slot * args.a_size + entry.a_offset + row * size :]
                a_1, a_2, a_3 = a_0[size:], a_0[2 * size :], a_0[3 * size :]
                together = row + 4 <= stop and segment.stop - segment.start >= _MANY_TOKENS
                for place in range(segment.start, segment.stop):
                    token = places[place]
                    x_I = x[token * args.x_stride + entry.input_start :]
                    h_R = h[token * args.h_size + entry.h_start + row :]
                    if together:
                        sum_0 = sum_1 = sum_2 = sum_3 = zeros()
                        for i in range(0, whole, LANES):
                            x_L = load(x_I, i)
                            sum_0 = add_product(sum_0, x_L, load(a_0, i))
                            sum_1 = add_product(sum_1, x_L, load(a_1, i))
                            sum_2 = add_product(sum_2, x_L, load(a_2, i))
                            sum_3 = add_product(sum_3, x_L, load(a_3, i))
                        h_R[0] = total(sum_0) + _rest(x_I, a_0, whole, size)
                        h_R[1] = total(sum_1) + _rest(x_I, a_1, whole, size)
                        h_R[2] = total(sum_2) + _rest(x_I, a_2, whole, size)
                        h_R[3] = total(sum_3) + _rest(x_I, a_3, whole, size)
                    else:
                        sums = zeros()
                        for i in range(0, whole, LANES):
                            sums = add_product(sums, load(x_I, i), load(a_0, i))
                        h_R[0] = total(sums) + _rest(x_I, a_0, whole, size)
                row += 4 if together else 1


@njit(fastmath=FASTMATH)  # type: ignore[untyped-decorator]
def _expand(args: Any, y: Any, b_E: Any) -> None:
    """``y[t, outputs] += scaling * sum over n, r of h[n, t, h_start + r] * B[n * rank + r]``; B is ``(N * R, O)``.

    Sums are rounded once to y's type, however many slices have the same outputs.
    """
    segments, places, entries, counts = _tables(args)
    h = floats(args.h, args.gathered * args.num_tokens * args.h_size)
    first, last = part(args.outputs, _LINE)
    sums = np.empty(_BLOCK_OUTPUTS, np.float32)
    for segment in segments:
        if counts[segment.slot] == 0:
            continue
        for column in range(first, last, _BLOCK_OUTPUTS):
            width = min(_BLOCK_OUTPUTS, last - column)
            for place in range(segment.start, segment.stop):
                token = places[place]
                sums[:width] = 0
                for p in range(counts[segment.slot]):
                    entry = entries[segment.slot, p]
                    start = max(column - entry.output_start, 0)
                    size = min(column + width - entry.output_start, entry.output_size) - start
                    own = sums[entry.output_start + start - column :]
                    for n in range(entry.gathered if size > 0 else 0):
                        h_R = h[(n * args.num_tokens + token) * args.h_size + entry.h_start :]
                        b_RO = b_E[segment.slot * args.b_size + entry.b_offset + start :]
                        for row in range(entry.rank):
                            b_O = b_RO[(n * entry.rank + row) * entry.output_size :]
                            scaled = entry.scaling * h_R[row]
                            for o in range(size):
                                own[o] += scaled * widen(b_O[o])
                y_O = y[token * args.y_stride + column :]
                for o in range(width):
                    y_O[o] = narrow(widen(y_O[o]) + sums[o], y_O[o])


@njit  # type: ignore[untyped-decorator]
def _shrink_of_type(args: Any) -> None:
    x, a = args.num_tokens * args.x_stride, args.num_slots * args.a_size
    if args.item_bytes == 2:
        _shrink(args, halves(args.x, x), halves(args.a, a))
    else:
        _shrink(args, floats(args.x, x), floats(args.a, a))


@njit  # type: ignore[untyped-decorator]
def _expand_of_type(args: Any) -> None:
    y, b = args.num_tokens * args.y_stride, args.num_slots * args.b_size
    if args.item_bytes == 2:
        _expand(args, halves(args.y, y), halves(args.b, b))
    else:
        _expand(args, floats(args.y, y), floats(args.b, b))


def _run_shrink(address: Any) -> None:
    _shrink_of_type(carray(address, (1,), ARGUMENTS)[0])


def _run_expand(address: Any) -> None:
    _expand_of_type(carray(address, (1,), ARGUMENTS)[0])


def _run_both(address: Any) -> None:
    args = carray(address, (1,), ARGUMENTS)[0]
    _shrink_of_type(args)
    barrier()
    _expand_of_type(args)


shrink_loop, expand_loop, delta_loop = (Loop(run, ARGUMENTS) for run in (_run_shrink, _run_expand, _run_both))
