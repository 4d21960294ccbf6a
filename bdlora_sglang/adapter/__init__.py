"""Adapters on disk: reading, checking and sharding. Needs torch and safetensors alone, no SGLang and no GPU."""

from bdlora_sglang.adapter.adapter import Adapter, LoRAModule
from bdlora_sglang.adapter.config import AdapterConfig, BDConfig, BlockSide
from bdlora_sglang.adapter.shard import LoRASlice, ModuleShard, SliceFactors, read_slice, slice_module

__all__ = [
    "Adapter",
    "AdapterConfig",
    "BDConfig",
    "BlockSide",
    "LoRAModule",
    "LoRASlice",
    "ModuleShard",
    "SliceFactors",
    "read_slice",
    "slice_module",
]
