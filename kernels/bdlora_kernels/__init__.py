"""BD-LoRA kernels. They need torch (and, on a GPU, Triton); they know neither adapters' files nor SGLang.

What runs Triton is in `bdlora_kernels.launch`, which this package does not import.
"""

from bdlora_kernels.layout import LayerFactors, PackedFactors, Slice, UnpackedSlice, pack
from bdlora_kernels.reference import add_lora_delta
from bdlora_kernels.segments import Segment, group_tokens
from bdlora_kernels.tables import SegmentTable, SliceTables

__all__ = [
    "LayerFactors",
    "PackedFactors",
    "Segment",
    "SegmentTable",
    "Slice",
    "SliceTables",
    "UnpackedSlice",
    "add_lora_delta",
    "group_tokens",
    "pack",
]
