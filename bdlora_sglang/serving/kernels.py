"""The kernels of a device: how a slot's factors and a batch's tokens are laid out for them, and the call."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from sglang.srt.utils import is_pin_memory_available

from bdlora_kernels import (
    EagerFactors,
    EagerSlots,
    Exchange,
    HostBlock,
    LayerFactors,
    PackedAdapter,
    SlotSize,
    TokenBatch,
    add_embedding_delta,
    add_lora_delta,
    group_tokens,
)
from bdlora_kernels.eager import expand, shrink
from bdlora_kernels.segments import FEW_TOKENS
from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.serving.cpu.recording import one_step

NO_SLOT = -1  # the base model: its tokens cost nothing
NO_EXPERTS = "LoRA on MoE experts is served on a CPU alone: on a GPU, one kernel of SGLang's computes all of them"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Slots(Protocol):
    """The slots of a pool, all layers together: `DeviceSlots` or `EagerSlots`."""

    @property
    def layers(self) -> Mapping[str, LayerFactors]:
        """By name, those that a slot has room for."""

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot on the device."""

    def host_block(self, elements: int) -> HostBlock:
        """Host memory for an adapter of so many elements, pinned where that makes copies faster."""

    def describe(self, adapter: PackedAdapter) -> None:
        """Add to an adapter in such memory what the kernels must know of it; raises ValueError if it does not fit."""

    def write(self, slot: int, adapter: PackedAdapter) -> None:
        """Fill a slot with a described adapter, on the current stream."""

    def clear(self, slot: int) -> None:
        """Forget what a slot holds."""


@dataclass(frozen=True)
class LayerShape:
    """Input and output features of a layer on this rank; A of one that ``looks_up`` has a column for each token id."""

    inputs: int
    outputs: int
    looks_up: bool = False


@dataclass(frozen=True)
class BatchLimits:
    """The most tokens of an eager batch, and of one in a captured decode graph (0: nothing is captured)."""

    tokens: int
    decode_graph_tokens: int


class Kernels(Protocol):
    """What the pool and the backend ask of a device. ``segments`` are what `forward_with_base` of the same takes.

    ``description`` says what computes LoRA, for the line that a server prints at its start.
    """

    description: str

    @property
    def no_experts(self) -> str | None:
        """Why they compute no LoRA in the middle of an MoE layer, where they do not."""

    def allocate(self, num_slots: int, sizes: Mapping[str, SlotSize], dtype: torch.dtype) -> Slots:
        """Empty slots, with this room for each layer."""

    def reserve(self, shapes: Mapping[str, LayerShape], batch: BatchLimits) -> int:
        """Take all memory that batches will need, and return its bytes; ``shapes`` are those of the slots' layers."""

    def compile(self, done: Callable[[int, int], None]) -> None:
        """Compile whatever a batch can run; ``done`` is told how many layers of how many."""

    def reserve_decode_graphs(self, max_tokens: int) -> None:
        """Make segments that captured decode graphs can read again and again, for up to ``max_tokens`` tokens."""

    def reserve_prefill_graphs(self, max_tokens: int) -> None:
        """The same for captured prefill graphs."""

    def segments(self, slots: Sequence[int], lengths: Sequence[int], graph: str | None) -> Any:
        """A batch's tokens by slot: those of each request, in order; ``graph`` is "decode", "prefill" or None."""

    def forward_with_base(
        self,
        base: Callable[[], torch.Tensor],
        outputs: int,
        x_TI: torch.Tensor,
        factors: LayerFactors,
        segments: Any,
        exchange: Exchange | None = None,
    ) -> torch.Tensor:
        """``base()``, the layer's output of ``(T, outputs)``, with the delta of each token's slot added in place:
        ``y[t, outputs] += scaling * exchange(x[t, inputs] @ A.T) @ B.T`` for every slice.

        An ``exchange`` is called on all ranks or on none, and what it is given is of the same shape on all.
        """

    def add_embedding_delta(
        self, y_TO: torch.Tensor, ids_T: torch.Tensor, first_id: int, factors: LayerFactors, segments: Any
    ) -> None:
        """``y[t] += scaling * A[:, ids[t] - first_id] @ B.T`` in place, for the tokens that A has columns for."""


def choose_kernels(device: torch.device, num_slots: int, exchanges: bool, deterministic: bool = False) -> Kernels:
    """Triton on a GPU (and in its interpreter, with ``TRITON_INTERPRET=1``), else PyTorch.

    Args:
        device: where the model is.
        num_slots: of the memory pool.
        exchanges, deterministic: as for `TritonKernels`.
    """
    if device.type == "cuda" or INTERPRETED:
        from bdlora_sglang.serving.triton_kernels import TritonKernels

        return TritonKernels(device, num_slots, exchanges, deterministic)
    return TorchKernels(device)


class TorchKernels:
    """Plain PyTorch: host-side segments, no CUDA graphs."""

    description = "PyTorch and Numba"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: tuple[Any, Any] = None, None

    @property
    def no_experts(self) -> str | None:
        return None if self._device.type == "cpu" else NO_EXPERTS

    def allocate(self, num_slots: int, sizes: Mapping[str, SlotSize], dtype: torch.dtype) -> Slots:
        return EagerSlots(num_slots, sizes, dtype, self._device, pins_memory(self._device))

    def reserve(self, shapes: Mapping[str, LayerShape], batch: BatchLimits) -> int:
        return 0

    def compile(self, done: Callable[[int, int], None]) -> None:
        pass

    def reserve_decode_graphs(self, max_tokens: int) -> None:
        _refuse_graphs("decode")

    def reserve_prefill_graphs(self, max_tokens: int) -> None:
        _refuse_graphs("prefill")

    def segments(self, slots: Sequence[int], lengths: Sequence[int], graph: str | None) -> Any:
        key = tuple(slots), tuple(lengths)
        if self._last[0] != key:
            # Only a CPU has loops for few tokens.
            few_tokens = FEW_TOKENS if self._device.type == "cpu" else 0
            self._last = key, group_tokens(slots, lengths, self._device, few_tokens)
        return self._last[1]

    def forward_with_base(
        self,
        base: Callable[[], torch.Tensor],
        outputs: int,
        x_TI: torch.Tensor,
        factors: LayerFactors,
        segments: Any,
        exchange: Exchange | None = None,
    ) -> torch.Tensor:
        assert isinstance(factors, EagerFactors)
        y_TO = base()
        _add_delta(y_TO, x_TI, factors, segments, exchange)
        return y_TO

    @one_step
    def add_embedding_delta(
        self, y_TO: torch.Tensor, ids_T: torch.Tensor, first_id: int, factors: LayerFactors, segments: Any
    ) -> None:
        assert isinstance(factors, EagerFactors)
        add_embedding_delta(y_TO, ids_T, first_id, factors, segments)


@one_step
def _add_delta(
    y_TO: torch.Tensor, x_TI: torch.Tensor, factors: EagerFactors, batch: TokenBatch, exchange: Exchange | None
) -> None:
    if exchange is None:
        add_lora_delta(y_TO, x_TI, factors, batch)
    elif (h_TW := shrink(x_TI, factors, batch)).numel():
        expand(y_TO, exchange(h_TW).view(-1, *h_TW.shape), factors, batch)


def give_back_host_memory() -> None:
    """Return pinned memory of adapters that are gone to the machine; PyTorch would keep it for later ones."""
    if torch.accelerator.is_available():
        torch.accelerator.empty_host_cache()


def pins_memory(device: torch.device) -> bool:
    return device.type != "cpu" and is_pin_memory_available()


def _refuse_graphs(phase: str) -> None:
    raise BDLoRAError(
        f"--cuda-graph-backend-{phase}: found CUDA graphs enabled, expected 'disabled': the PyTorch kernels cannot be "
        "captured"
    )
