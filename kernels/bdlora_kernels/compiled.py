"""Loops that Numba compiles for a CPU: numbers of 16 bits, memory by its address, and PyTorch's own threads.

A loop is a function of one record of arguments. All threads run it with the same record, and each takes its part.
"""

import ctypes
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic, overload

# Not "nnan" nor "ninf": a NaN or an infinity of one token must come out as such.
FASTMATH = {"reassoc", "contract", "nsz", "arcp"}
# What PyTorch gives a thread at least.
_GRAIN = 32768

# The OpenMP that PyTorch has loaded: its threads are the ones that the rank's cores are for.
_parallel = ctypes.PyDLL(None).GOMP_parallel
_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
_parallel.restype = None
_thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
_num_threads = types.ExternalFunction("omp_get_num_threads", types.int32())
# Called by each thread of a loop: none goes on before all have come.
barrier = types.ExternalFunction("GOMP_barrier", types.void())


class Loop:
    """``function``, which takes the address of a record of ``arguments``, compiled when it first runs.

    Numba keeps what it has compiled in its cache, so that later processes load it.
    """

    def __init__(self, function: Callable[[Any], None], arguments: np.dtype[Any]) -> None:
        self._function = function
        self._record: Any = np.ctypeslib.as_ctypes_type(arguments)

    @cached_property
    def _address(self) -> Any:
        return cfunc(types.void(types.voidptr), cache=True)(self._function).address

    def __call__(self, *values: float, work: int = _GRAIN) -> None:
        """Run with these arguments; on PyTorch's threads where the ``work``, in elements, pays for waking them."""
        threads = torch.get_num_threads() if work >= _GRAIN else 1
        _parallel(self._address, ctypes.byref(self._record(*values)), threads, 0)


@intrinsic  # type: ignore[untyped-decorator]
def pointer(_context: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(address), codegen


@njit  # type: ignore[untyped-decorator]
def floats(address: Any, size: Any) -> Any:
    """The float32 at an address."""
    return carray(pointer(address), (size,), np.float32)


@njit  # type: ignore[untyped-decorator]
def halves(address: Any, size: Any) -> Any:
    """The bits of the bfloat16 at an address."""
    return carray(pointer(address), (size,), np.uint16)


@njit  # type: ignore[untyped-decorator]
def float16s(address: Any, size: Any) -> Any:
    """The bits of the float16 at an address, signed, which tells them from bfloat16."""
    return carray(pointer(address), (size,), np.int16)


@njit  # type: ignore[untyped-decorator]
def integers(address: Any, size: Any) -> Any:
    """The int64 at an address."""
    return carray(pointer(address), (size,), np.int64)


@njit  # type: ignore[untyped-decorator]
def short_integers(address: Any, size: Any) -> Any:
    """The int32 at an address."""
    return carray(pointer(address), (size,), np.int32)


@njit(fastmath=FASTMATH)  # type: ignore[untyped-decorator]
def part(size: int, step: int) -> Any:
    """Those of ``size`` that the calling thread takes, in whole steps: start and end."""
    threads = _num_threads()
    chunk = ((size + threads - 1) // threads + step - 1) // step * step
    start = min(size, _thread_number() * chunk)
    return start, min(size, start + chunk)


@njit(inline="always")  # type: ignore[untyped-decorator]
def exp(x: Any) -> Any:
    """``e**x`` of a float32, to two units in the last place, in instructions that LLVM makes a vector of.

    ``2**n`` by its bits, times a polynomial on half a step to both sides (Cephes' ``expf``). Below -87.7 it is 0, above
    88.3 infinite: both a little before a float32 ends.
    """
    x = max(x, np.float32(-88))
    n = min(np.floor(x * np.float32(1.44269504088896341) + np.float32(0.5)), np.float32(128))
    # ln 2 in two parts: the first has few bits, so that its product with n is exact.
    r = (x - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    y = y * r + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(5.0000001201e-1)
    y = y * r * r + r + np.float32(1)
    return y * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


def widen(value: Any) -> Any:
    """A float32, or the bits of a bfloat16, as a float32."""
    raise NotImplementedError("for compiled code alone")


def narrow(value: Any, like: Any) -> Any:
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


@overload(widen, inline="always")  # type: ignore[untyped-decorator]
def _overload_widen(value: Any) -> Any:
    return _upper_half if value == types.uint16 else _as_it_is


@overload(narrow, inline="always")  # type: ignore[untyped-decorator]
def _overload_narrow(value: Any, like: Any) -> Any:
    return _nearest_upper_half if like == types.uint16 else _unchanged
