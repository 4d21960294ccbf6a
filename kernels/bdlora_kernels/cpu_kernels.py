"""Shrink and expand for a few tokens an adapter, compiled by Numba: each factor is read once, from where it stands.

PyTorch has batched products alone for this, and around them copies of x and y in the order of the slots: 1.7 times the
time. A kernel runs on PyTorch's own OpenMP threads, each of which takes a part of the columns of h or y: no thread
writes what another does, and a token's result does not depend on the batch around it.
"""

import ctypes
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic, overload

from bdlora_kernels.layout import ENTRY, SEGMENT

# What a kernel reads, addresses and sizes in elements: `SEGMENT` (segments), int64 (places), `ENTRY` (slots, capacity),
# int64 (slots), the factors (slots, slot_size), x or y in float32 (tokens, row_stride), of which row_size count, and h
# in float32 (gathered, tokens, h_size).
ARGUMENTS = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("segments", "num_segments", "places", "num_places", "entries", "counts", "num_slots", "capacity"),
            *("factors", "slot_size", "rows", "num_tokens", "row_stride", "row_size", "h", "gathered", "h_size"),
        )
    ]
)

# Columns of y that are added up at a time: B's rows are read in long runs, and the sums stay in the L1 cache.
_BLOCK_OUTPUTS = 1024
# Not "nnan" nor "ninf": a NaN or an infinity of one token must come out as such.
_FASTMATH = {"reassoc", "contract", "nsz", "arcp"}

_thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
_num_threads = types.ExternalFunction("omp_get_num_threads", types.int32())


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(_context: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(address), codegen


def _widen(value: Any) -> Any:
    """A float32, or the bits of a bfloat16, as a float32."""
    raise NotImplementedError("for compiled code alone")


def _as_it_is(value: Any) -> Any:
    return value


def _upper_half(value: Any) -> Any:
    return np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)


@overload(_widen, inline="always")  # type: ignore[untyped-decorator]
def _overload_widen(value: Any) -> Any:
    return _upper_half if value == types.uint16 else _as_it_is


@njit(fastmath=_FASTMATH)  # type: ignore[untyped-decorator]
def _part(size: int) -> Any:
    """The columns of ``size`` that the calling thread takes: whole cache lines of float32."""
    threads = _num_threads()
    chunk = ((size + threads - 1) // threads + 15) // 16 * 16
    start = min(size, _thread_number() * chunk)
    return start, min(size, start + chunk)


@njit  # type: ignore[untyped-decorator]
def _tables(args: Any) -> Any:
    """The batch's segments and the places of their tokens; the slots' slices, and how many each slot has."""
    segments = carray(_pointer(args.segments), (args.num_segments,), SEGMENT)
    places = carray(_pointer(args.places), (args.num_places,), np.int64)
    entries = carray(_pointer(args.entries), (args.num_slots, args.capacity), ENTRY)
    counts = carray(_pointer(args.counts), (args.num_slots,), np.int64)
    return segments, places, entries, counts


@njit(fastmath=_FASTMATH)  # type: ignore[untyped-decorator]
def _shrink(args: Any, a_E: Any) -> None:
    """``h[0, t, h_start + r] = x[t, inputs] @ A[r]`` for the tokens t of each segment and the slices of its slot."""
    segments, places, entries, counts = _tables(args)
    x = carray(_pointer(args.rows), (args.num_tokens * args.row_stride,), np.float32)
    h = carray(_pointer(args.h), (args.num_tokens * args.h_size,), np.float32)
    for segment in segments:
        if counts[segment.slot] == 0:
            continue
        last_entry = entries[segment.slot, counts[segment.slot] - 1]
        first, last = _part(last_entry.h_start + last_entry.rank)
        for p in range(counts[segment.slot]):
            entry = entries[segment.slot, p]
            size = entry.input_size
            row, stop = max(first - entry.h_start, 0), min(last - entry.h_start, entry.rank)
            while row < stop:
                a_0 = a_E[segment.slot * args.slot_size + entry.a_offset + row * size :]
                a_1, a_2, a_3 = a_0[size:], a_0[2 * size :], a_0[3 * size :]
                together = row + 4 <= stop
                for place in range(segment.start, segment.stop):
                    token = places[place]
                    x_I = x[token * args.row_stride + entry.input_start :]
                    h_R = h[token * args.h_size + entry.h_start + row :]
                    if together:
                        sum_0 = sum_1 = sum_2 = sum_3 = np.float32(0)
                        for i in range(size):
                            sum_0 += x_I[i] * _widen(a_0[i])
                            sum_1 += x_I[i] * _widen(a_1[i])
                            sum_2 += x_I[i] * _widen(a_2[i])
                            sum_3 += x_I[i] * _widen(a_3[i])
                        h_R[0], h_R[1], h_R[2], h_R[3] = sum_0, sum_1, sum_2, sum_3
                    else:
                        total = np.float32(0)
                        for i in range(size):
                            total += x_I[i] * _widen(a_0[i])
                        h_R[0] = total
                row += 4 if together else 1


@njit(fastmath=_FASTMATH)  # type: ignore[untyped-decorator]
def _expand(args: Any, b_E: Any) -> None:
    """``y[t, outputs] += scaling * sum over n, r of h[n, t, h_start + r] * B[n * rank + r]``; B is ``(N * R, O)``."""
    segments, places, entries, counts = _tables(args)
    y = carray(_pointer(args.rows), (args.num_tokens * args.row_stride,), np.float32)
    h = carray(_pointer(args.h), (args.gathered * args.num_tokens * args.h_size,), np.float32)
    first, last = _part(args.row_size)
    sums = np.empty(_BLOCK_OUTPUTS, np.float32)
    for segment in segments:
        for p in range(counts[segment.slot]):
            entry = entries[segment.slot, p]
            size, rank = entry.output_size, entry.rank
            start, stop = max(first - entry.output_start, 0), min(last - entry.output_start, size)
            for column in range(start, stop, _BLOCK_OUTPUTS):
                width = min(_BLOCK_OUTPUTS, stop - column)
                b_RO = b_E[segment.slot * args.slot_size + entry.b_offset + column :]
                for place in range(segment.start, segment.stop):
                    token = places[place]
                    sums[:width] = 0
                    for n in range(entry.gathered):
                        h_R = h[(n * args.num_tokens + token) * args.h_size + entry.h_start :]
                        row = 0
                        while row + 4 <= rank:
                            b_0 = b_RO[(n * rank + row) * size :]
                            b_1, b_2, b_3 = b_0[size:], b_0[2 * size :], b_0[3 * size :]
                            h_0, h_1, h_2, h_3 = h_R[row], h_R[row + 1], h_R[row + 2], h_R[row + 3]
                            for o in range(width):
                                low = h_0 * _widen(b_0[o]) + h_1 * _widen(b_1[o])
                                sums[o] += low + h_2 * _widen(b_2[o]) + h_3 * _widen(b_3[o])
                            row += 4
                        while row < rank:
                            b_0 = b_RO[(n * rank + row) * size :]
                            for o in range(width):
                                sums[o] += h_R[row] * _widen(b_0[o])
                            row += 1
                    y_O = y[token * args.row_stride + entry.output_start + column :]
                    for o in range(width):
                        y_O[o] += entry.scaling * sums[o]


def _shrink_float32(address: Any) -> None:
    args = carray(address, (1,), ARGUMENTS)[0]
    _shrink(args, carray(_pointer(args.factors), (args.num_slots * args.slot_size,), np.float32))


def _shrink_bfloat16(address: Any) -> None:
    args = carray(address, (1,), ARGUMENTS)[0]
    _shrink(args, carray(_pointer(args.factors), (args.num_slots * args.slot_size,), np.uint16))


def _expand_float32(address: Any) -> None:
    args = carray(address, (1,), ARGUMENTS)[0]
    _expand(args, carray(_pointer(args.factors), (args.num_slots * args.slot_size,), np.float32))


def _expand_bfloat16(address: Any) -> None:
    args = carray(address, (1,), ARGUMENTS)[0]
    _expand(args, carray(_pointer(args.factors), (args.num_slots * args.slot_size,), np.uint16))


_KERNELS = {
    ("shrink", torch.float32): _shrink_float32,
    ("shrink", torch.bfloat16): _shrink_bfloat16,
    ("expand", torch.float32): _expand_float32,
    ("expand", torch.bfloat16): _expand_bfloat16,
}

# The OpenMP that PyTorch has loaded: its threads are the ones that the rank's cores are for.
_parallel = ctypes.PyDLL(None).GOMP_parallel
_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
_parallel.restype = None
_Arguments = ctypes.c_int64 * len(ARGUMENTS.names or ())


@cache
def compiled(name: str, dtype: torch.dtype) -> Any:
    """The kernel "shrink" or "expand" for factors of ``dtype``; Numba keeps what it has compiled in its cache."""
    return cfunc(types.void(types.voidptr), cache=True)(_KERNELS[name, dtype])


def run(name: str, dtype: torch.dtype, *arguments: int) -> None:
    """Run a kernel with the values of `ARGUMENTS` on PyTorch's threads: as many as ``torch.get_num_threads()``."""
    _parallel(compiled(name, dtype).address, _Arguments(*arguments), torch.get_num_threads(), 0)
