"""Loops of a decoder layer beside its matrix products, compiled: one call in place of ten to thirty of PyTorch's.

A small model's decode step spends as long in such calls as in its matrix products. Sums and products are of float32,
rounded once, as SGLang's kernels for GPUs do it. Tensors are float32 or bfloat16, the last dimension contiguous.
Shape suffixes: T tokens, I features, H heads, D head size, P positions, C rotary dimensions.
"""

import math
from typing import Any

import numpy as np
import torch
from numba import carray, njit

from bdlora_kernels.compiled import FASTMATH, Loop, exp, floats, halves, integers, narrow, part, widen
from bdlora_sglang.serving.cpu.recording import one_step

DTYPES = (torch.float32, torch.bfloat16)


@one_step
def rms_norm(
    x_TI: torch.Tensor, residual_TI: torch.Tensor | None, weight_I: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``s / sqrt(mean(s^2) + epsilon) * weight`` of ``s = x + residual``, and s where there is a residual."""
    y_TI = torch.empty_like(x_TI)
    # Where there is no residual, x stands for what is not read.
    sum_TI = x_TI if residual_TI is None else torch.empty_like(x_TI)
    terms = x_TI, x_TI if residual_TI is None else residual_TI, weight_I, y_TI, sum_TI
    size = x_TI.shape[-1]
    _rms_norm_loop(
        *(term.data_ptr() for term in terms),
        *(residual_TI is not None, x_TI.numel() // size, size, x_TI.itemsize, epsilon),
        work=x_TI.numel(),
    )
    return y_TI, None if residual_TI is None else sum_TI


@one_step
def silu_and_mul(x_TI: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of the gate and up that each token's features are: ``(T, I / 2)``."""
    tokens, size = x_TI.shape[0], x_TI.shape[1] // 2
    y_TI = x_TI.new_empty(tokens, size)
    _silu_loop(x_TI.data_ptr(), y_TI.data_ptr(), tokens, size, x_TI.itemsize, work=x_TI.numel())
    return y_TI


@one_step
def rotate(
    positions_T: torch.Tensor,
    query_TI: torch.Tensor,
    key_TI: torch.Tensor,
    head_size: int,
    cos_sin_PC: torch.Tensor,
    is_neox_style: bool,
) -> None:
    """Rotary embedding in place, of the first C elements of each head.

    Args:
        positions_T: int64; not checked, as by SGLang's kernels.
        query_TI, key_TI: heads side by side; tokens may be apart.
        cos_sin_PC: for each position C / 2 cosines, then as many sines.
        is_neox_style: element i is rotated with i + C / 2, else 2 i with 2 i + 1.
    """
    both = query_TI, key_TI
    _rotate_loop(
        *(positions_T.data_ptr(), len(positions_T), head_size, cos_sin_PC.data_ptr(), *cos_sin_PC.shape),
        *(is_neox_style, query_TI.itemsize, *(x.data_ptr() for x in both), *(x.stride(0) for x in both)),
        *(x.shape[1] // head_size for x in both),
        work=sum(x.numel() for x in both),
    )


# Addresses, and sizes in elements.
_RMS_NORM = np.dtype(
    [
        *((name, np.int64) for name in ("x", "residual", "weight", "y", "sum")),
        *((name, np.int64) for name in ("has_residual", "tokens", "size", "item_bytes")),
        ("epsilon", np.float64),
    ]
)
_SILU = np.dtype([(name, np.int64) for name in ("x", "y", "tokens", "size", "item_bytes")])
_ROTATE = np.dtype(
    [
        *((name, np.int64) for name in ("positions", "tokens", "head_size", "cos_sin", "num_positions", "rotated")),
        *((name, np.int64) for name in ("is_neox_style", "item_bytes", "query", "key")),
        *((name, np.int64) for name in ("query_stride", "key_stride", "query_heads", "key_heads")),
    ]
)


@njit(fastmath=FASTMATH, error_model="numpy")
def _rms_norm(args: Any, x: Any, residual: Any, weight: Any, y: Any, total: Any) -> None:
    size = args.size
    first, last = part(args.tokens, 1)
    for token in range(first, last):
        x_I, residual_I, y_I = x[token * size :], residual[token * size :], y[token * size :]
        total_I = total[token * size :]
        squares = np.float32(0)
        if args.has_residual != 0:
            for i in range(size):
                value = widen(x_I[i]) + widen(residual_I[i])
                squares += value * value
                total_I[i] = narrow(value, x_I[i])
        else:
            for i in range(size):
                squares += widen(x_I[i]) * widen(x_I[i])
        scale = np.float32(1 / math.sqrt(squares / np.float32(size) + args.epsilon))
        if args.has_residual != 0:
            for i in range(size):
                value = widen(x_I[i]) + widen(residual_I[i])
                y_I[i] = narrow(value * scale * widen(weight[i]), x_I[i])
        else:
            for i in range(size):
                y_I[i] = narrow(widen(x_I[i]) * scale * widen(weight[i]), x_I[i])


def _run_rms_norm(address: Any) -> None:
    args = carray(address, (1,), _RMS_NORM)[0]
    size = args.tokens * args.size
    if args.item_bytes == 2:
        x, residual, weight = halves(args.x, size), halves(args.residual, size), halves(args.weight, args.size)
        _rms_norm(args, x, residual, weight, halves(args.y, size), halves(args.sum, size))
    else:
        x, residual, weight = floats(args.x, size), floats(args.residual, size), floats(args.weight, args.size)
        _rms_norm(args, x, residual, weight, floats(args.y, size), floats(args.sum, size))


@njit(fastmath=FASTMATH, error_model="numpy")
def _silu(args: Any, x: Any, y: Any) -> None:
    size = args.size
    first, last = part(args.tokens * size, 16)
    while first < last:  # a token at a time, as far as it is this thread's
        token, start = first // size, first % size
        stop = min(size, start + last - first)
        gate_I, up_I, y_I = x[2 * token * size :], x[(2 * token + 1) * size :], y[token * size :]
        for i in range(start, stop):
            gate = widen(gate_I[i])
            y_I[i] = narrow(gate / (np.float32(1) + exp(-gate)) * widen(up_I[i]), x[0])
        first += stop - start


def _run_silu(address: Any) -> None:
    args = carray(address, (1,), _SILU)[0]
    size = args.tokens * args.size
    if args.item_bytes == 2:
        _silu(args, halves(args.x, 2 * size), halves(args.y, size))
    else:
        _silu(args, floats(args.x, 2 * size), floats(args.y, size))


@njit(fastmath=FASTMATH, error_model="numpy")
def _rotate(args: Any, x: Any, stride: int, heads: int, cos_sin: Any) -> None:
    half = args.rotated // 2
    step, apart = (1, half) if args.is_neox_style != 0 else (2, 1)
    positions = integers(args.positions, args.tokens)
    first, last = part(args.tokens, 1)
    for token in range(first, last):
        cos = cos_sin[positions[token] * args.rotated :]
        sin = cos[half:]
        for head in range(heads):
            x_D = x[token * stride + head * args.head_size :]
            other_D = x_D[apart:]
            for i in range(half):
                one, other = widen(x_D[i * step]), widen(other_D[i * step])
                x_D[i * step] = narrow(one * widen(cos[i]) - other * widen(sin[i]), x_D[0])
                other_D[i * step] = narrow(other * widen(cos[i]) + one * widen(sin[i]), x_D[0])


def _run_rotate(address: Any) -> None:
    args = carray(address, (1,), _ROTATE)[0]
    queries, keys = args.tokens * args.query_stride, args.tokens * args.key_stride
    if args.item_bytes == 2:
        cos_sin_16 = halves(args.cos_sin, args.num_positions * args.rotated)
        _rotate(args, halves(args.query, queries), args.query_stride, args.query_heads, cos_sin_16)
        _rotate(args, halves(args.key, keys), args.key_stride, args.key_heads, cos_sin_16)
    else:
        cos_sin = floats(args.cos_sin, args.num_positions * args.rotated)
        _rotate(args, floats(args.query, queries), args.query_stride, args.query_heads, cos_sin)
        _rotate(args, floats(args.key, keys), args.key_stride, args.key_heads, cos_sin)


_rms_norm_loop = Loop(_run_rms_norm, _RMS_NORM)
_silu_loop = Loop(_run_silu, _SILU)
_rotate_loop = Loop(_run_rotate, _ROTATE)
