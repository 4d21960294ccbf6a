"""The Triton kernels as the pool and the backend use them: `Kernels` of a GPU. Importing this imports Triton."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bdlora_kernels import DeviceFactors, DeviceSlots, Exchange, LayerFactors, SegmentTable, SlotSize
from bdlora_kernels.configurations import DECODE_TOKENS, device_configurations
from bdlora_kernels.device_slots import ALL_LAYERS
from bdlora_kernels.launch import (
    Scratch,
    add_embedding_delta_triton,
    forward_with_base,
    make_second_stream,
    shape_of,
)
from bdlora_sglang.serving.kernels import INTERPRETED, NO_EXPERTS, NO_SLOT, BatchLimits, LayerShape, Slots, pins_memory


class TritonKernels:
    """Triton's segment kernels. All that they read stands at fixed addresses: captured or not, the call is the same."""

    description = "Triton kernels"

    def __init__(
        self, device: torch.device, num_slots: int, exchanges: bool = False, deterministic: bool = False
    ) -> None:
        """On a device, for so many slots.

        Args:
            exchanges: TP ranks exchange the shrink outputs of every layer.
            deterministic: a token's result is the same whatever else is in its batch (batch-invariant).
        """
        self._device, self._num_slots, self._exchanges = device, num_slots, exchanges
        self._configurations = device_configurations(device, deterministic)
        self._second_stream = make_second_stream(device)
        self._slots = DeviceSlots(num_slots, {}, torch.float32, device, pin_memory=False)
        self._shapes: Mapping[str, LayerShape] = {}
        self._scratch: Scratch | None = None
        self._scratch_tokens = 0
        self._tables: dict[str, _Table] = {}

    @property
    def no_experts(self) -> str | None:
        return NO_EXPERTS

    def allocate(self, num_slots: int, sizes: Mapping[str, SlotSize], dtype: torch.dtype) -> Slots:
        self._slots = DeviceSlots(num_slots, sizes, dtype, self._device, pins_memory(self._device))
        return self._slots

    def reserve(self, shapes: Mapping[str, LayerShape], batch: BatchLimits) -> int:
        self._shapes = {name: shape for name, shape in shapes.items() if name in self._slots.layers}
        if not self._slots.layers:
            return 0
        largest = max(batch.tokens, batch.decode_graph_tokens)
        self._scratch, self._scratch_tokens = self._new_scratch(largest), largest
        # Tiles differ in size, and so do the tables of small and of large batches.
        for name, tokens in (("small", min(DECODE_TOKENS, largest)), ("large", largest)):
            self._tables[name] = self._new_table(tokens, self._eager_block(tokens))
        if batch.decode_graph_tokens:
            self.reserve_decode_graphs(batch.decode_graph_tokens)
        return _device_bytes(self._scratch, *(table.segments for table in self._tables.values()))

    def reserve_decode_graphs(self, max_tokens: int) -> None:
        self._reserve_graphs("decode", max_tokens, self._configurations.block_tokens(decode=True))

    def reserve_prefill_graphs(self, max_tokens: int) -> None:
        self._reserve_graphs("prefill", max_tokens, self._configurations.block_tokens(decode=False))

    def _reserve_graphs(self, phase: str, max_tokens: int, block_tokens: int) -> None:
        reserved = self._tables.get(phase)
        if reserved is None or reserved.segments.max_tokens < max_tokens:
            self._tables[phase] = self._new_table(max_tokens, block_tokens)

    def segments(self, slots: Sequence[int], lengths: Sequence[int], graph: str | None) -> "_DeviceBatch":
        table = self._tables[graph] if graph is not None else self._eager_table(sum(lengths))
        table.fill(slots, lengths)
        # A captured graph serves whatever is in the slots when it is replayed.
        active = self._slots.active_layers(slots) if graph is None else ALL_LAYERS
        return _DeviceBatch(table.segments, table.scratch, active)

    def _eager_table(self, tokens: int) -> "_Table":
        table = self._tables.get("small" if tokens <= DECODE_TOKENS else "large")
        if table is not None and tokens <= table.segments.max_tokens:
            return table
        # Beyond what SGLang has said a batch can be, or before anything was reserved.
        return self._new_table(max(1, tokens), self._eager_block(tokens))

    def _eager_block(self, tokens: int) -> int:
        return self._configurations.block_tokens(decode=tokens <= DECODE_TOKENS)

    def _new_table(self, max_tokens: int, block_tokens: int) -> "_Table":
        # One forward comes after the other, so all of them share the scratch that is large enough.
        shared = self._scratch if max_tokens <= self._scratch_tokens else None
        scratch = shared or self._new_scratch(max_tokens)
        return _Table(SegmentTable(max_tokens, self._num_slots, block_tokens, self._device), scratch)

    def _new_scratch(self, max_tokens: int) -> Scratch:
        """Room for any batch of up to so many tokens."""
        blocks = {self._configurations.block_tokens(decode) for decode in (True, False)}
        rows = max(self._configurations.max_partial_tokens(max_tokens, block) for block in blocks)
        return Scratch.allocate(max_tokens, self._slots.h_size, rows, self._device)

    def compile(self, done: Callable[[int, int], None]) -> None:
        if INTERPRETED:
            return
        kinds = {self._launch_key(name, shape): (name, shape) for name, shape in self._shapes.items()}
        for count, (name, shape) in enumerate(kinds.values(), 1):
            for tokens in token_counts(self._scratch_tokens):
                self._launch_empty(name, shape, tokens)
            done(count, len(kinds))

    def _launch_empty(self, name: str, shape: LayerShape, tokens: int) -> None:
        """No token is in a slot: nothing is read or written, so one row stands for all."""
        factors, y_TO = self._slots.layers[name], self._slots.zeros(1, shape.outputs).expand(tokens, shape.outputs)
        batch = replace(self.segments([NO_SLOT], [tokens], graph=None), active_layers=ALL_LAYERS)
        if shape.looks_up:
            ids_T = torch.zeros(tokens, dtype=torch.int64, device=self._device)
            self.add_embedding_delta(y_TO, ids_T, 0, factors, batch)
        else:
            x_TI = self._slots.zeros(1, shape.inputs).expand(tokens, shape.inputs)
            # Alone: ranks may differ in what they compile.
            gathered = tokens * factors.tables.expand.gathered
            exchange = (lambda h_TR: h_TR.new_empty(gathered, h_TR.shape[1])) if self._exchanges else None
            self.forward_with_base(lambda: y_TO, shape.outputs, x_TI, factors, batch, exchange)

    def _launch_key(self, name: str, shape: LayerShape) -> object:
        tables = self._slots.layers[name].tables
        return shape, tables.h_size, tables.shrink.block_rank, tables.expand.block_rank, tables.expand.gathered

    def forward_with_base(
        self,
        base: Callable[[], torch.Tensor],
        outputs: int,
        x_TI: torch.Tensor,
        factors: LayerFactors,
        segments: Any,
        exchange: Exchange | None = None,
    ) -> torch.Tensor:
        assert (exchange is not None) == self._exchanges, "else other kernels run than were compiled"
        assert isinstance(factors, DeviceFactors) and isinstance(segments, _DeviceBatch)
        if not segments.active_layers >> factors.index & 1:
            return base()
        tables, batch = factors.tables, (segments.table, segments.scratch)
        shape = shape_of(x_TI, outputs, tables, segments.table, self._exchanges)
        configuration = self._configurations.choose(shape)
        operands = x_TI, factors, tables, *batch, configuration, self._second_stream
        return forward_with_base(base, outputs, *operands, exchange)

    def add_embedding_delta(
        self, y_TO: torch.Tensor, ids_T: torch.Tensor, first_id: int, factors: LayerFactors, segments: Any
    ) -> None:
        assert isinstance(factors, DeviceFactors) and isinstance(segments, _DeviceBatch)
        if len(ids_T) and segments.active_layers >> factors.index & 1:
            tables, batch = factors.tables, (segments.table, segments.scratch)
            configuration = self._configurations.choose(shape_of(y_TO, y_TO.shape[1], tables, segments.table))
            add_embedding_delta_triton(y_TO, ids_T, first_id, factors, tables, *batch, configuration)


def token_counts(most: int) -> list[int]:
    """Batch sizes up to ``most`` that stand for all: configurations change with the size, slowly with large ones."""
    counts = list(range(1, min(most, DECODE_TOKENS) + 1))
    while counts[-1] < most:
        counts.append(min(most, counts[-1] * 17 // 16 + 1))
    return counts


@dataclass
class _Table:
    """Segments at fixed addresses, and the batch that they describe."""

    segments: SegmentTable
    scratch: Scratch
    key: object = None

    def fill(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        key = tuple(slots), tuple(lengths)
        if key != self.key:
            self.segments.fill(slots, lengths)
            self.key = key


@dataclass(frozen=True)
class _DeviceBatch:
    """``active_layers`` has a bit for each layer that any slot of the batch holds (`DeviceFactors.index`)."""

    table: SegmentTable
    scratch: Scratch
    active_layers: int


def _device_bytes(*holders: Any) -> int:
    """Bytes of all tensors that are attributes of ``holders``, views and what they share counted once."""
    tensors = [value for holder in holders for value in vars(holder).values() if isinstance(value, torch.Tensor)]
    # Not by address: on the meta device there is none.
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
