"""Initial values of BD-LoRA's factors, where PEFT's own are not plain LoRA's.

PEFT draws the A of a plain LoRA uniformly within ``1 / sqrt(in)``, as ``nn.Linear`` does (``LoraLayer.reset_lora_
parameters``). The block-diagonal A of a row-parallel layer, packed as ``(r, in / N)``, it draws within
``sqrt(6 N / in)`` (``BlockDiagonalLinear``, PEFT 0.21.2): ``sqrt(6 N)`` times as wide, 6.9 times at 8 blocks.
"""

import math
from typing import TYPE_CHECKING, Literal, get_args

import torch

from bdlora_sglang.errors import BDLoRAError

if TYPE_CHECKING:
    from peft import PeftModel

Init = Literal["per-block", "whole-layer", "peft"]
INITS: tuple[Init, ...] = get_args(Init)


def initialise_like_lora(
    model: "PeftModel", seed: int, init: Init = "per-block", adapter_name: str = "default"
) -> "PeftModel":
    """Draw the A of every LoRA layer of a PEFT model anew, from ``seed`` alone, and set B to zero.

    A plain A, ``(r, in)``, is uniform within ``1 / sqrt(in)``. A block-diagonal one, ``(r, in / N)``, is uniform within

    - ``per-block``: ``1 / sqrt(in / N)``: each block is a plain LoRA on its own ``in / N`` inputs, and what A gives has
      the variance that it has in a plain LoRA;
    - ``whole-layer``: ``1 / sqrt(in)``: a plain LoRA on the whole layer, of whose A each row keeps its own block;
    - ``peft``: ``sqrt(6 N / in)``: PEFT's own.

    Equal shapes get equal values: LoRA and BD-LoRA of one rank start from the same A in column-parallel layers.

    Args:
        model: with linear LoRA layers; changed in place, and returned.
        seed: of the values; the state of PyTorch's own generators is neither used nor changed.

    Raises:
        BDLoRAError: an unknown ``init``, or no layer with this adapter.
    """
    if init not in INITS:
        raise BDLoRAError(f"--init: found {init!r}, expected one of {', '.join(INITS)}")
    generator = torch.Generator().manual_seed(seed)
    layers = [layer for _, layer in model.named_modules() if adapter_name in getattr(layer, "lora_A", ())]
    if not layers:
        raise BDLoRAError(f"model: found no LoRA layer of the adapter '{adapter_name}', expected one to initialise")
    with torch.no_grad():
        for layer in layers:
            factor_a, factor_b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
            bound = _bound(layer.in_features, getattr(factor_a, "nblocks", 1), init)
            values = torch.empty(factor_a.weight.shape).uniform_(-bound, bound, generator=generator)
            factor_a.weight.copy_(values)
            factor_b.weight.zero_()
    return model


def _bound(inputs: int, nblocks: int, init: Init) -> float:
    if nblocks == 1 or init == "whole-layer":
        return 1 / math.sqrt(inputs)
    return math.sqrt((1 if init == "per-block" else 6) * nblocks / inputs)
