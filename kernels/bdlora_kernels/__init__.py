"""BD-LoRA kernels. They need torch (and, on a GPU, Triton); they know neither adapters' files nor SGLang."""

from bdlora_kernels.layout import LayerFactors, PackedFactors, Slice, UnpackedSlice, pack
from bdlora_kernels.reference import add_lora_delta
from bdlora_kernels.segments import Segment, group_tokens

__all__ = [
    "LayerFactors",
    "PackedFactors",
    "Segment",
    "Slice",
    "UnpackedSlice",
    "add_lora_delta",
    "group_tokens",
    "pack",
]
