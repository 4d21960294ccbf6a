"""The kernels of a device: how a slot's factors and a batch's tokens are laid out for them, and the call."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from bdlora_kernels import BatchedFactors, LayerFactors, PackedFactors, add_lora_delta, group_tokens
from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.serving.sharding import SlotSize


class Kernels(Protocol):
    """What the pool and the backend ask of a device. ``segments`` are what `forward_with_base` of the same takes."""

    def allocate(self, num_slots: int, size: SlotSize, dtype: torch.dtype) -> LayerFactors:
        """The slots of one layer."""

    def reserve_decode_graphs(self, max_tokens: int) -> None:
        """Make segments that captured decode graphs can read again and again, for up to ``max_tokens`` tokens."""

    def reserve_prefill_graphs(self, max_tokens: int) -> None:
        """The same for captured prefill graphs."""

    def segments(self, slots: Sequence[int], lengths: Sequence[int], graph: str | None) -> Any:
        """A batch's tokens by slot: those of each request, in order; ``graph`` is "decode", "prefill" or None."""

    def forward_with_base(
        self, base: Callable[[], torch.Tensor], outputs: int, x_TI: torch.Tensor, factors: LayerFactors, segments: Any
    ) -> torch.Tensor:
        """``base()``, the layer's output of ``(T, outputs)``, with the delta of each token's slot added in place:
        ``y[t, outputs] += scaling * (x[t, inputs] @ A.T) @ B.T`` for every slice."""


def choose_kernels(device: torch.device, num_slots: int, needs_torch: bool) -> Kernels:
    """Triton on a GPU (and in its interpreter, with ``TRITON_INTERPRET=1``), else PyTorch.

    Args:
        device: where the model is.
        num_slots: of the memory pool.
        needs_torch: the sharding exchanges shrink outputs, which has no Triton version yet.
    """
    if not needs_torch and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"):
        return TritonKernels(device, num_slots)
    return TorchKernels(device)


class TorchKernels:
    """Plain PyTorch: host-side segments, no CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocate(self, num_slots: int, size: SlotSize, dtype: torch.dtype) -> LayerFactors:
        return BatchedFactors.allocate(num_slots, size.a, size.b, dtype, self._device)

    def reserve_decode_graphs(self, max_tokens: int) -> None:
        _refuse_graphs("decode")

    def reserve_prefill_graphs(self, max_tokens: int) -> None:
        _refuse_graphs("prefill")

    def segments(self, slots: Sequence[int], lengths: Sequence[int], graph: str | None) -> Any:
        return group_tokens(slots, lengths, self._device)

    def forward_with_base(
        self, base: Callable[[], torch.Tensor], outputs: int, x_TI: torch.Tensor, factors: LayerFactors, segments: Any
    ) -> torch.Tensor:
        assert isinstance(factors, BatchedFactors)
        y_TO = base()
        add_lora_delta(y_TO, x_TI, factors, segments)
        return y_TO


class TritonKernels:
    """Triton's segment kernels. All that they read stands at fixed addresses: captured or not, the call is the same."""

    def __init__(self, device: torch.device, num_slots: int) -> None:
        from bdlora_kernels.configurations import device_configurations
        from bdlora_kernels.launch import make_second_stream

        self._device, self._num_slots = device, num_slots
        self._configurations = device_configurations(device)
        self._second_stream = make_second_stream(device)
        self._h_size = 1
        self._reserved: dict[str, _DeviceBatch] = {}

    def allocate(self, num_slots: int, size: SlotSize, dtype: torch.dtype) -> LayerFactors:
        from bdlora_kernels.tables import SliceTables

        self._h_size = max(self._h_size, size.ranks)
        # A layer that no adapter touches has empty slots.
        tables = SliceTables.allocate(num_slots, max(1, size.usual_rank), max(1, size.ranks), self._device)
        # Zeros, so that the memory is really there: a server must not run out of it at its first request.
        a_SE, b_SE = (torch.zeros(num_slots, n, dtype=dtype, device=self._device) for n in (size.a, size.b))
        return DeviceFactors(a_SE, b_SE, [()] * num_slots, tables=tables)

    def reserve_decode_graphs(self, max_tokens: int) -> None:
        self._reserved["decode"] = self._new_batch(max_tokens, self._configurations.decode_block_tokens)

    def reserve_prefill_graphs(self, max_tokens: int) -> None:
        self._reserved["prefill"] = self._new_batch(max_tokens, self._configurations.prefill_block_tokens)

    def segments(self, slots: Sequence[int], lengths: Sequence[int], graph: str | None) -> Any:
        if graph is None:
            tokens = max(1, sum(lengths))
            batch = self._new_batch(tokens, self._configurations.block_tokens(tokens))
        else:
            batch = self._reserved[graph]
        batch.table.fill(slots, lengths)
        return batch

    def _new_batch(self, max_tokens: int, block_tokens: int) -> "_DeviceBatch":
        from bdlora_kernels.launch import Scratch
        from bdlora_kernels.tables import SegmentTable

        table = SegmentTable(max_tokens, self._num_slots, block_tokens, self._device)
        splits = self._configurations.max_splits(block_tokens)
        return _DeviceBatch(table, Scratch.allocate(max_tokens, self._h_size, splits, self._device))

    def forward_with_base(
        self, base: Callable[[], torch.Tensor], outputs: int, x_TI: torch.Tensor, factors: LayerFactors, segments: Any
    ) -> torch.Tensor:
        from bdlora_kernels.launch import forward_with_base

        assert isinstance(factors, DeviceFactors) and isinstance(segments, _DeviceBatch)
        batch = segments.table, segments.scratch
        return forward_with_base(
            base, outputs, x_TI, factors, factors.tables, *batch, second_stream=self._second_stream
        )


@dataclass
class DeviceFactors(LayerFactors):
    """Slots whose slices the device knows, too."""

    tables: Any = field(kw_only=True)

    def write(self, slot: int, packed: PackedFactors) -> None:
        super().write(slot, packed)
        self.tables.write(slot, packed.slices)

    def clear(self, slot: int) -> None:
        super().clear(slot)
        self.tables.write(slot, ())


@dataclass(frozen=True)
class _DeviceBatch:
    table: Any
    scratch: Any


def _refuse_graphs(phase: str) -> None:
    raise BDLoRAError(
        f"--cuda-graph-backend-{phase}: found CUDA graphs enabled, expected 'disabled': the PyTorch kernels cannot be "
        "captured"
    )
