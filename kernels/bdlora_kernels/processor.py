"""What this machine's processor has instructions for."""

from functools import cache

import torch

_ONEDNN_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@cache
def has_products(dtype: torch.dtype) -> bool:
    """Whether products of matrices of this type are as fast as of float32; oneDNN knows (PyTorch's inductor asks it).

    Elsewhere PyTorch has plain loops for 16 bits, which take five times as long from a few dozen rows on.
    """
    if dtype not in _ONEDNN_NAMES:
        return dtype == torch.float32
    asked = getattr(torch.ops.mkldnn, f"_is_mkldnn_{_ONEDNN_NAMES[dtype]}_supported", None)
    return asked is not None and bool(asked())
