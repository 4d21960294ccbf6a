"""BD-LoRA kernels. They need torch (and, on a GPU, Triton); they know neither adapters' files nor SGLang.

What runs Triton is in `bdlora_kernels.launch`, which this package does not import.
"""

from bdlora_kernels.device_slots import DeviceFactors, DeviceSlots
from bdlora_kernels.eager import EagerFactors, add_lora_delta
from bdlora_kernels.eager_slots import EagerSlots
from bdlora_kernels.embedding import add_embedding_delta
from bdlora_kernels.layout import Exchange, LayerFactors, PackedFactors, Slice
from bdlora_kernels.packing import (
    HostBlock,
    LayerPlan,
    PackedAdapter,
    PlannedSlice,
    UnpackedSlice,
    pack,
    pack_adapter,
    plan_layer,
)
from bdlora_kernels.segments import Segment, TokenBatch, group_tokens
from bdlora_kernels.slot_size import SlotSize
from bdlora_kernels.tables import SegmentTable, SliceTables

__all__ = [
    "DeviceFactors",
    "DeviceSlots",
    "EagerFactors",
    "EagerSlots",
    "Exchange",
    "HostBlock",
    "LayerFactors",
    "LayerPlan",
    "PackedAdapter",
    "PackedFactors",
    "PlannedSlice",
    "Segment",
    "SegmentTable",
    "Slice",
    "SliceTables",
    "SlotSize",
    "TokenBatch",
    "UnpackedSlice",
    "add_embedding_delta",
    "add_lora_delta",
    "group_tokens",
    "pack",
    "pack_adapter",
    "plan_layer",
]
