"""The CPU platform: unmodified SGLang on a machine without a GPU.

SGLang finds it through the entry point group ``sglang.srt.platforms``; ``SGLANG_PLATFORM=bdlora_cpu`` chooses it.
"""

import os

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from bdlora_sglang.serving.hardware import PLATFORM_NAME


def activate() -> str | None:
    """Return the platform's class path if the user chose it, else None so that SGLang's own discovery decides."""
    if os.environ.get("SGLANG_PLATFORM") != PLATFORM_NAME:
        return None
    return f"{BDLoRACpuPlatform.__module__}.{BDLoRACpuPlatform.__qualname__}"


class BDLoRACpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Torch-native attention, gloo collectives, no pinned memory (SGLang: ``SRTPlatform``)."""

    _enum = PlatformEnum.OOT

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def is_pin_memory_available(self, device: object = None) -> bool:
        return False

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU
