"""The CPU platform: unmodified SGLang on a machine without a GPU.

SGLang finds it through the entry point group ``sglang.srt.platforms``; ``SGLANG_PLATFORM=bdlora_cpu`` chooses it.
"""

import os
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from bdlora_sglang.serving.hardware import ATTENTION_BACKEND, PLATFORM_NAME


def activate() -> str | None:
    """Return the platform's class path if the user chose it, else None so that SGLang's own discovery decides."""
    if os.environ.get("SGLANG_PLATFORM") != PLATFORM_NAME:
        return None
    return f"{BDLoRACpuPlatform.__module__}.{BDLoRACpuPlatform.__qualname__}"


class BDLoRACpuPlatform(CpuDeviceMixin, SRTPlatform):
    """What SGLang asks of a platform, answered for a CPU without SGLang's own kernels (SGLang: ``SRTPlatform``)."""

    _enum = PlatformEnum.OOT

    def get_default_attention_backend(self) -> str:
        return ATTENTION_BACKEND

    def init_backend(self) -> None:
        # SGLang asks for the platform in the midst of importing most of what is imported here.
        from sglang.srt.layers.attention.attention_registry import register_attention_backend

        from bdlora_sglang.serving.cpu.fused_ops import register_fused_ops

        register_attention_backend(ATTENTION_BACKEND)(_attention)
        register_fused_ops(self.get_dispatch_key_name())

    def post_load_model(self, model: torch.nn.Module) -> None:
        from bdlora_sglang.serving.cpu.linear import choose_linear_methods

        choose_linear_methods(model)

    def get_torch_distributed_backend_str(self) -> str:
        from bdlora_sglang.serving.cpu.process_group import BACKEND, register_backend

        register_backend()
        return BACKEND

    def is_pin_memory_available(self, device: object = None) -> bool:
        return False

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU


def _attention(model_runner: Any) -> Any:
    from bdlora_sglang.serving.cpu.attention import CPUAttention

    return CPUAttention(model_runner)
