"""Products with 16-bit weights on a processor without instructions for them: of float32, rounded once.

PyTorch's own loops for these take twice as long as this for four rows and five times for 64. Shape suffixes: T tokens,
I inputs, O outputs.
"""

from typing import Any

import numpy as np
import torch
from numba import carray, njit

from bdlora_kernels.compiled import Loop, float16s, floats, halves, part
from bdlora_kernels.lanes import LANES, add_product, load, total, zeros
from bdlora_sglang.serving.cpu.recording import one_step

# So many tokens are multiplied by each row of the weight as it is read; for more, a block of rows is widened before.
_FEW_TOKENS = 16
# Elements of such a block: as float32 it stays in a core's cache until it is multiplied.
_BLOCK = 2**18

_ARGUMENTS = np.dtype([(name, np.int64) for name in ("x", "weight", "y", "tokens", "inputs", "outputs", "is_float16")])


@one_step
def widened_linear(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias`` for ``x`` of ``(..., inputs)``, all of float16 or all of bfloat16."""
    outputs, inputs = weight_OI.shape
    x_TI = x.reshape(-1, inputs).float()
    tokens, y_TO = len(x_TI), x.new_empty(*x.shape[:-1], outputs)
    if tokens <= _FEW_TOKENS and inputs % LANES == 0 and weight_OI.is_contiguous():
        sums_TO = torch.empty(tokens, outputs)
        is_float16 = weight_OI.dtype == torch.float16
        addresses = x_TI.data_ptr(), weight_OI.data_ptr(), sums_TO.data_ptr()
        _loop(*addresses, tokens, inputs, outputs, is_float16, work=weight_OI.numel())
        return y_TO.copy_((sums_TO if bias_O is None else sums_TO + bias_O.float()).view(y_TO.shape))
    size = max(1, _BLOCK // inputs)
    for start in range(0, outputs, size):
        block = slice(start, start + size)
        w_IB = weight_OI[block].float().T
        sums_TB = x_TI @ w_IB if bias_O is None else torch.addmm(bias_O[block].float(), x_TI, w_IB)
        y_TO.view(-1, outputs)[:, block] = sums_TB
    return y_TO


@njit
def _product(args: Any, weight: Any) -> None:
    """Each thread takes some of the weight's rows, and reads each once for four tokens."""
    tokens, inputs = args.tokens, args.inputs
    x, y = floats(args.x, tokens * inputs), floats(args.y, tokens * args.outputs)
    first, last = part(args.outputs, LANES)
    for row in range(first, last):
        w_I = weight[row * inputs :]
        y_T = y[row:]
        token = 0
        while token + 4 <= tokens:
            x_0 = x[token * inputs :]
            x_1, x_2, x_3 = x_0[inputs:], x_0[2 * inputs :], x_0[3 * inputs :]
            sum_0 = sum_1 = sum_2 = sum_3 = zeros()
            for i in range(0, inputs, LANES):
                w_L = load(w_I, i)
                sum_0 = add_product(sum_0, load(x_0, i), w_L)
                sum_1 = add_product(sum_1, load(x_1, i), w_L)
                sum_2 = add_product(sum_2, load(x_2, i), w_L)
                sum_3 = add_product(sum_3, load(x_3, i), w_L)
            y_T[token * args.outputs] = total(sum_0)
            y_T[(token + 1) * args.outputs] = total(sum_1)
            y_T[(token + 2) * args.outputs] = total(sum_2)
            y_T[(token + 3) * args.outputs] = total(sum_3)
            token += 4
        while token < tokens:
            x_I = x[token * inputs :]
            sums = zeros()
            for i in range(0, inputs, LANES):
                sums = add_product(sums, load(x_I, i), load(w_I, i))
            y_T[token * args.outputs] = total(sums)
            token += 1


def _run(address: Any) -> None:
    args = carray(address, (1,), _ARGUMENTS)[0]
    size = args.outputs * args.inputs
    if args.is_float16 != 0:
        _product(args, float16s(args.weight, size))
    else:
        _product(args, halves(args.weight, size))


_loop = Loop(_run, _ARGUMENTS)
