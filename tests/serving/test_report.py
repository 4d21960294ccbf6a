"""What a server prints of its memory."""

from types import SimpleNamespace
from typing import Any

import torch

from bdlora_perf.serve.servers import lora_kernels
from tests.serving.test_layers import as_rank  # noqa: F401

MIB = 2**20


def lines(slot_bytes: int, used: int) -> list[str]:
    from bdlora_sglang.serving.communication_free import CommunicationFree
    from bdlora_sglang.serving.kernels import TorchKernels
    from bdlora_sglang.serving.report import memory_lines

    pool = SimpleNamespace(max_loras_per_batch=4, slots=SimpleNamespace(slot_bytes=slot_bytes))
    manager: Any = SimpleNamespace(
        memory_pool=pool,
        scratch_bytes=3 * MIB,
        sharding=CommunicationFree(),
        kernels=TorchKernels(torch.device("cpu")),
        used_part_of_slot=lambda: used / slot_bytes,
        loras={"a": SimpleNamespace(host_bytes=5 * MIB)},
        device=torch.device("cpu"),
    )
    return list(memory_lines(manager, 320, 16384))


def test_slots_scratch_and_what_is_left(as_rank: Any) -> None:  # noqa: F811
    as_rank(0, 1)
    first, host = lines(slot_bytes=6 * MIB, used=5 * MIB)
    assert "320 layers, 4 slots of 6.0 MiB per GPU (24.0 MiB), 3.0 MiB of scratch" in first
    assert "KV cache: 16384 tokens" in first
    assert lora_kernels({"enable_lora": True, "lora_backend": "bdlora"}, first) == "bdlora: PyTorch and Numba"
    assert lora_kernels({"enable_lora": True, "lora_backend": "csgmv"}, "") == "csgmv"
    assert "keeps up to 5.0 MiB per GPU until it is unloaded" in host and "--max-loaded-loras" in host


def test_waste_is_said(as_rank: Any) -> None:  # noqa: F811
    """As with --max-local-rank 4096 for adapters of rank 32."""
    as_rank(0, 1)
    _, waste, _ = lines(slot_bytes=640 * MIB, used=5 * MIB)
    assert "fill 5.0 MiB of a slot, 1%" in waste
    assert "would be 512 in the same memory" in waste
