"""Shrink and expand for a few tokens an adapter, compiled by Numba: each factor is read once, from where it stands.

PyTorch has batched products alone for this, and around them copies of x and y in the order of the slots: 1.7 times the
time. A kernel runs on PyTorch's own OpenMP threads, each of which takes a part of the columns of h or y: no thread
writes what another does, and a token's result does not depend on the batch around it. Factors are read in the order in
which they stand: several rows side by side are short runs for the memory, and take 1.2 to 2 times as long.
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
# int64 (slots), the factors (slots, slot_size), x or y of the same type (tokens, row_stride), of which row_size count,
# and h in float32 (gathered, tokens, h_size).
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
_BLOCK_OUTPUTS = 8192
# From so many tokens of a slot on, arithmetic is what takes the time, and four rows of A share what is read of x.
_MANY_TOKENS = 3
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


def _narrow(value: Any, like: Any) -> Any:
    """A float32 as it is, or the bits of the nearest bfloat16 where ``like`` are such bits."""
    raise NotImplementedError("for compiled code alone")


def _as_it_is(value: Any) -> Any:
    return value


def _upper_half(value: Any) -> Any:
    return np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)


def _unchanged(value: Any, like: Any) -> Any:
    return value


def _nearest_upper_half(value: Any, like: Any) -> Any:
    bits = np.float32(value).view(np.uint32)
    # Half of the last bit that stays, and to even where it is exactly that.
    nearest = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    quiet_nan = np.uint32(bits | np.uint32(0x400000))
    return np.uint16((quiet_nan if value != value else nearest) >> np.uint32(16))


@overload(_widen, inline="always")  # type: ignore[untyped-decorator]
def _overload_widen(value: Any) -> Any:
    return _upper_half if value == types.uint16 else _as_it_is


@overload(_narrow, inline="always")  # type: ignore[untyped-decorator]
def _overload_narrow(value: Any, like: Any) -> Any:
    return _nearest_upper_half if like == types.uint16 else _unchanged


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
def _shrink(args: Any, x: Any, a_E: Any) -> None:
    """``h[0, t, h_start + r] = x[t, inputs] @ A[r]`` for the tokens t of each segment and the slices of its slot."""
    segments, places, entries, counts = _tables(args)
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
                together = row + 4 <= stop and segment.stop - segment.start >= _MANY_TOKENS
                for place in range(segment.start, segment.stop):
                    token = places[place]
                    x_I = x[token * args.row_stride + entry.input_start :]
                    h_R = h[token * args.h_size + entry.h_start + row :]
                    if together:
                        sum_0 = sum_1 = sum_2 = sum_3 = np.float32(0)
                        for i in range(size):
                            sum_0 += _widen(x_I[i]) * _widen(a_0[i])
                            sum_1 += _widen(x_I[i]) * _widen(a_1[i])
                            sum_2 += _widen(x_I[i]) * _widen(a_2[i])
                            sum_3 += _widen(x_I[i]) * _widen(a_3[i])
                        h_R[0], h_R[1], h_R[2], h_R[3] = sum_0, sum_1, sum_2, sum_3
                    else:
                        total = np.float32(0)
                        for i in range(size):
                            total += _widen(x_I[i]) * _widen(a_0[i])
                        h_R[0] = total
                row += 4 if together else 1


@njit(fastmath=_FASTMATH)  # type: ignore[untyped-decorator]
def _expand(args: Any, y: Any, b_E: Any) -> None:
    """``y[t, outputs] += scaling * sum over n, r of h[n, t, h_start + r] * B[n * rank + r]``; B is ``(N * R, O)``.

    Sums are rounded once to y's type, however many slices have the same outputs.
    """
    segments, places, entries, counts = _tables(args)
    h = carray(_pointer(args.h), (args.gathered * args.num_tokens * args.h_size,), np.float32)
    first, last = _part(args.row_size)
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
                        b_RO = b_E[segment.slot * args.slot_size + entry.b_offset + start :]
                        for row in range(entry.rank):
                            b_O = b_RO[(n * entry.rank + row) * entry.output_size :]
                            scaled = entry.scaling * h_R[row]
                            for o in range(size):
                                own[o] += scaled * _widen(b_O[o])
                y_O = y[token * args.row_stride + column :]
                for o in range(width):
                    y_O[o] = _narrow(_widen(y_O[o]) + sums[o], y_O[o])


def _shrink_float32(address: Any) -> None:
    args = carray(address, (1,), ARGUMENTS)[0]
    x = carray(_pointer(args.rows), (args.num_tokens * args.row_stride,), np.float32)
    _shrink(args, x, carray(_pointer(args.factors), (args.num_slots * args.slot_size,), np.float32))


def _shrink_bfloat16(address: Any) -> None:
    args = carray(address, (1,), ARGUMENTS)[0]
    x = carray(_pointer(args.rows), (args.num_tokens * args.row_stride,), np.uint16)
    _shrink(args, x, carray(_pointer(args.factors), (args.num_slots * args.slot_size,), np.uint16))


def _expand_float32(address: Any) -> None:
    args = carray(address, (1,), ARGUMENTS)[0]
    y = carray(_pointer(args.rows), (args.num_tokens * args.row_stride,), np.float32)
    _expand(args, y, carray(_pointer(args.factors), (args.num_slots * args.slot_size,), np.float32))


def _expand_bfloat16(address: Any) -> None:
    args = carray(address, (1,), ARGUMENTS)[0]
    y = carray(_pointer(args.rows), (args.num_tokens * args.row_stride,), np.uint16)
    _expand(args, y, carray(_pointer(args.factors), (args.num_slots * args.slot_size,), np.uint16))


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
