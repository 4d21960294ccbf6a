"""SGLang's norms, activations and rotary embeddings on the CPU platform: `loops` where they can, its own way elsewhere.

SGLang's seam: ``BaseFusedOp.register_oot_forward``, for the key that ``SRTPlatform.get_dispatch_key_name`` names.
"""

from typing import Any

import torch
from sglang.kernels.fused_op import BaseFusedOp
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.rotary_embedding.base import LinearScalingRotaryEmbedding, RotaryEmbedding
from sglang.srt.layers.rotary_embedding.rope_variant import DynamicNTKScalingRotaryEmbedding, Llama3RotaryEmbedding

from bdlora_sglang.serving.cpu import loops

# Those that differ in their table of cosines and sines alone.
_ROTARY = (RotaryEmbedding, LinearScalingRotaryEmbedding, DynamicNTKScalingRotaryEmbedding, Llama3RotaryEmbedding)


def register_fused_ops(platform_key: str) -> None:
    """Make SGLang use them on the platform of this dispatch key, in this process."""
    BaseFusedOp.register_oot_forward(RMSNorm, _rms_norm, platform_key)
    BaseFusedOp.register_oot_forward(SiluAndMul, _silu_and_mul, platform_key)
    for rotary in _ROTARY:
        BaseFusedOp.register_oot_forward(rotary, _rotate, platform_key)


def _rms_norm(
    self: RMSNorm, x: torch.Tensor, residual: torch.Tensor | None = None, *others: Any, **options: Any
) -> Any:
    """``RMSNorm.forward``."""
    operands = [x, self.weight] if residual is None else [x, self.weight, residual]
    is_plain = (
        not (self.cast_x_before_out_mul or self.fp32_residual or _any_given(others, options))
        and self.override_orig_dtype is None
        and self.variance_size_override is None
        and x.dtype in loops.DTYPES
        and all(operand.dtype is x.dtype and operand.is_contiguous() for operand in operands)
        and x.shape[-1] == self.hidden_size
    )
    if not is_plain:
        return self.forward_native(x, residual, *others, **options)
    y, total = loops.rms_norm(x, residual, self.weight, self.variance_epsilon)
    return y if residual is None else (y, total)


def _rotate(
    self: RotaryEmbedding, positions: torch.Tensor, query: torch.Tensor, key: Any, *others: Any, **options: Any
) -> Any:
    """``RotaryEmbedding.forward``; in place, as SGLang's kernels for GPUs do it."""
    cache = self.cos_sin_cache
    is_plain = (
        not _any_given(others, options)
        and cache.dtype in loops.DTYPES
        and positions.dtype is torch.int64
        and positions.is_contiguous()
        and key is not None
        and all(x.dtype is cache.dtype and x.dim() == 2 and x.stride(1) == 1 for x in (query, key))
    )
    if not is_plain:
        return self.forward_native(positions, query, key, *others, **options)
    loops.rotate(positions, query, key, self.head_size, cache, self.is_neox_style)
    return query, key


def _silu_and_mul(self: SiluAndMul, x: torch.Tensor) -> torch.Tensor:
    """``SiluAndMul.forward``."""
    if x.dtype in loops.DTYPES and x.dim() == 2 and x.is_contiguous() and x.shape[1] % 2 == 0:
        return loops.silu_and_mul(x)
    return self.forward_native(x)


def _any_given(others: tuple[Any, ...], options: dict[str, Any]) -> bool:
    return any(value is not None for value in (*others, *options.values()))
