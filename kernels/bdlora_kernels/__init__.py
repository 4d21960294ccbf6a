"""BD-LoRA kernels. They need torch (and, on a GPU, Triton); they know neither adapters' files nor SGLang.

What runs Triton is in `bdlora_kernels.launch`, which this package does not import.
"""

from bdlora_kernels.batched import BatchedFactors, add_lora_delta
from bdlora_kernels.layout import LayerFactors, PackedFactors, Slice, UnpackedSlice, pack
from bdlora_kernels.segments import Segment, TokenBatch, group_tokens
from bdlora_kernels.tables import SegmentTable, SliceTables

__all__ = [
    "BatchedFactors",
    "LayerFactors",
    "PackedFactors",
    "Segment",
    "SegmentTable",
    "Slice",
    "SliceTables",
    "TokenBatch",
    "UnpackedSlice",
    "add_lora_delta",
    "group_tokens",
    "pack",
]
