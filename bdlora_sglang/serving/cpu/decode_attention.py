"""Attention of one token a request, compiled: keys and values are read once, where they stand in the KV cache.

Shape suffixes: T requests, H KV heads, G query heads of a KV head, L tokens of a request, D head size of queries and
keys, V of values, S places in the KV cache, R requests that there is room for, C tokens that each has room for.
"""

from typing import Any

import numpy as np
import torch
from numba import carray, njit

from bdlora_kernels.compiled import FASTMATH, Loop, exp, floats, halves, integers, narrow, part, short_integers, widen
from bdlora_sglang.serving.cpu.loops import DTYPES


def can_attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether `attend` computes with tensors of these types and layouts."""
    return q.dtype in DTYPES and all(x.dtype is q.dtype and x.is_contiguous() for x in (keys, values))


def attend(
    q_THGD: torch.Tensor,
    keys_SHD: torch.Tensor,
    values_SHV: torch.Tensor,
    table_RC: torch.Tensor,
    request_T: torch.Tensor,
    length_T: torch.Tensor,
    longest: int,
    scaling: float,
) -> torch.Tensor:
    """``softmax(scaling * q @ k.T) @ v`` of each query and its request's tokens: ``(T, H * G * V)``.

    Args:
        table_RC: int32, the places of each request's tokens in the KV cache.
        request_T, length_T: int64, a request's row of the table, and how many of its tokens there are.
        longest: of the lengths.
    """
    tokens, heads, per_head, size = q_THGD.shape
    value_size = values_SHV.shape[2]
    q_THGD = q_THGD.contiguous()
    o_TO = q_THGD.new_empty(tokens, heads * per_head * value_size)
    # For each KV head of a request: its scores, and the sums of its values.
    scratch = torch.empty(tokens * heads * per_head * (longest + value_size), dtype=torch.float32)
    _loop(
        *(x.data_ptr() for x in (q_THGD, keys_SHD, values_SHV, table_RC, request_T, length_T, o_TO, scratch)),
        *(tokens, heads, per_head, size, value_size, len(keys_SHD), *table_RC.shape, longest, q_THGD.itemsize, scaling),
        work=tokens * heads * longest * size,
    )
    return o_TO


# Addresses, and sizes in elements.
_ARGUMENTS = np.dtype(
    [
        *((name, np.int64) for name in ("q", "keys", "values", "table", "requests", "lengths", "o", "scratch")),
        *((name, np.int64) for name in ("tokens", "heads", "per_head", "size", "value_size", "places")),
        *((name, np.int64) for name in ("rows", "columns", "longest", "item_bytes")),
        ("scaling", np.float64),
    ]
)


@njit(inline="always")
def _softmax(scores_L: Any, length: int) -> None:
    """In place, of the first ``length``."""
    largest = scores_L[0]
    for place in range(1, length):
        largest = max(largest, scores_L[place])
    total = np.float32(0)
    for place in range(length):
        weight = exp(scores_L[place] - largest)
        scores_L[place] = weight
        total += weight
    scale = np.float32(1) / total
    for place in range(length):
        scores_L[place] *= scale


@njit(fastmath=FASTMATH, error_model="numpy")
def _attend(args: Any, q: Any, keys: Any, values: Any, o: Any) -> None:
    heads, per_head, size, value_size = args.heads, args.per_head, args.size, args.value_size
    table = short_integers(args.table, args.rows * args.columns)
    requests, lengths = integers(args.requests, args.tokens), integers(args.lengths, args.tokens)
    own = per_head * (args.longest + value_size)
    scratch = floats(args.scratch, args.tokens * heads * own)
    scaling = np.float32(args.scaling)
    first, last = part(args.tokens * heads, 1)
    # One request's heads at a time, as far as they are this thread's: side by side in the cache, they are one stream.
    while first < last:
        token, start = first // heads, first % heads
        stop = min(heads, start + last - first)
        length = lengths[token]
        places_L = table[requests[token] * args.columns :]
        for place in range(length):
            for head in range(start, stop):
                k_D = keys[(places_L[place] * heads + head) * size :]
                scores_GL = scratch[(token * heads + head) * own + per_head * value_size :]
                for query in range(per_head):
                    q_D = q[((token * heads + head) * per_head + query) * size :]
                    score = np.float32(0)
                    for i in range(size):
                        score += widen(q_D[i]) * widen(k_D[i])
                    scores_GL[query * length + place] = score * scaling
        for head in range(start, stop):
            sums_GV = scratch[(token * heads + head) * own :]
            for query in range(per_head):
                _softmax(sums_GV[per_head * value_size + query * length :], length)
            for i in range(per_head * value_size):
                sums_GV[i] = np.float32(0)
        for place in range(length):
            for head in range(start, stop):
                v_V = values[(places_L[place] * heads + head) * value_size :]
                sums_GV = scratch[(token * heads + head) * own :]
                for query in range(per_head):
                    weight = sums_GV[per_head * value_size + query * length + place]
                    sums_V = sums_GV[query * value_size :]
                    for i in range(value_size):
                        sums_V[i] += weight * widen(v_V[i])
        for head in range(start, stop):
            o_GV = o[(token * heads + head) * per_head * value_size :]
            sums_GV = scratch[(token * heads + head) * own :]
            for i in range(per_head * value_size):
                o_GV[i] = narrow(sums_GV[i], o[0])
        first += stop - start


def _run(address: Any) -> None:
    args = carray(address, (1,), _ARGUMENTS)[0]
    queries, cached = args.tokens * args.heads * args.per_head, args.places * args.heads
    if args.item_bytes == 2:
        q, keys, values = (
            halves(args.q, queries * args.size),
            halves(args.keys, cached * args.size),
            halves(args.values, cached * args.value_size),
        )
        _attend(args, q, keys, values, halves(args.o, queries * args.value_size))
    else:
        q, keys, values = (
            floats(args.q, queries * args.size),
            floats(args.keys, cached * args.size),
            floats(args.values, cached * args.value_size),
        )
        _attend(args, q, keys, values, floats(args.o, queries * args.value_size))


_loop = Loop(_run, _ARGUMENTS)
