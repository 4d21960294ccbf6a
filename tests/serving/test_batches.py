"""What describing a batch costs: nothing where there is nothing to do, and memory that was taken at the start."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from bdlora_kernels import PackedAdapter, SegmentTable, SlotSize, UnpackedSlice, pack_adapter, plan_layer
from bdlora_kernels.configurations import DECODE_TOKENS, Shape
from bdlora_kernels.device_slots import ALL_LAYERS
from bdlora_sglang.serving.backend import BDLoRABackend
from bdlora_sglang.serving.kernels import NO_SLOT, BatchLimits, Kernels, LayerShape, TorchKernels
from bdlora_sglang.serving.triton_kernels import TritonKernels, token_counts
from tests.kernels.test_device_slots import Counted

CPU = torch.device("cpu")
SLOTS, INPUTS, OUTPUTS, RANK = 4, 32, 48, 4
SIZE = SlotSize(RANK * INPUTS, RANK * OUTPUTS, RANK, RANK)
SHAPES = {name: LayerShape(INPUTS, OUTPUTS) for name in ("q", "o")}
MAX_TOKENS, GRAPH_TOKENS = 600, 16


def adapter(kernels: TritonKernels, slots: Any, *names: str) -> PackedAdapter:
    part = UnpackedSlice(torch.ones(RANK, INPUTS), torch.ones(OUTPUTS, RANK), 0, 0, 1.0)
    packed = pack_adapter({name: plan_layer([part.planned()]) for name in names}, slots.host_block)
    slots.describe(packed)
    return packed


@pytest.fixture
def triton() -> tuple[TritonKernels, Any]:
    """Kernels that are never run, and their slots."""
    kernels = TritonKernels(CPU, SLOTS)
    slots = kernels.allocate(SLOTS, dict.fromkeys(SHAPES, SIZE), torch.float32)
    kernels.reserve(SHAPES, BatchLimits(MAX_TOKENS, GRAPH_TOKENS))
    return kernels, slots


def copies(call: Callable[[], object]) -> int:
    with Counted() as counted:
        call()
    return counted.copies


@pytest.mark.parametrize("graph", [None, "decode"])
def test_an_unchanged_batch_is_not_described_again(triton: tuple[TritonKernels, Any], graph: str | None) -> None:
    kernels, _ = triton

    def describe(slots: Sequence[int], lengths: Sequence[int]) -> int:
        return copies(lambda: kernels.segments(slots, lengths, graph))

    assert describe([0, 1], [1, 1]) > 0
    assert describe([0, 1], [1, 1]) == 0
    assert describe([1, 0], [1, 1]) > 0
    assert describe([1, 0], [1, 2]) > 0
    # Another table in between does not matter, nor what is in the slots.
    kernels.segments([2], [1], "decode" if graph is None else None)
    assert describe([1, 0], [1, 2]) == 0
    batch = kernels.segments([1, 0], [1, 2], graph)
    assert batch.table.tokens_T[:3].tolist() == [1, 2, 0]
    assert batch.table.tiles_GF[:2].tolist() == [[0, 0, 2, 1], [1, 2, 1, 1]]


def test_the_same_for_the_pytorch_kernels() -> None:
    kernels = TorchKernels(CPU)
    first = kernels.segments([0, 1], [1, 2], None)
    assert kernels.segments([0, 1], [1, 2], None) is first
    assert kernels.segments([1, 1], [1, 2], None) is not first


class Recording(TorchKernels):
    def __init__(self) -> None:
        super().__init__(CPU)
        self.described: list[tuple[Sequence[int], Sequence[int], str | None]] = []

    def segments(self, slots: Sequence[int], lengths: Sequence[int], graph: str | None) -> Any:
        self.described.append((slots, lengths, graph))
        return super().segments(slots, lengths, graph)


def prepare(slots: list[int], graph: str | None, mode: ForwardMode = ForwardMode.DECODE) -> tuple[Any, list[Any]]:
    kernels: Kernels = Recording()
    backend = BDLoRABackend(SLOTS, CPU)
    backend.use(None, kernels)  # type: ignore[arg-type]
    lengths = torch.arange(1, 1 + len(slots), dtype=torch.int32)
    batch = SimpleNamespace(forward_mode=mode, batch_size=len(slots), extend_seq_lens=lengths, return_logprob=False)
    backend.prepare(batch, slots, graph)
    return backend.batch_info, kernels.described  # type: ignore[attr-defined]


def test_base_only_eager_batches_do_nothing() -> None:
    info, described = prepare([NO_SLOT] * 3, graph=None)
    assert described == [] and not info.has_active_lora and info.segments is None


@pytest.mark.parametrize("graph", ["decode", "prefill"])
def test_graphs_find_no_tokens_of_base_only_batches(graph: str) -> None:
    """A prefill graph runs the kernels whatever the batch, and so does the capture of a decode graph."""
    info, described = prepare([NO_SLOT] * 3, graph)
    assert described == [((), (), graph)] and not info.has_active_lora and info.segments is not None


def test_lengths() -> None:
    assert prepare([0, NO_SLOT], None)[1] == [([0, NO_SLOT], [1, 1], None)]
    assert prepare([0, NO_SLOT], None, ForwardMode.EXTEND)[1] == [([0, NO_SLOT], [1, 2], None)]


def test_layers_that_no_slot_of_the_batch_holds_run_the_base_layer_alone(triton: tuple[TritonKernels, Any]) -> None:
    """What a launch would need is not there, so it would raise; the slots may be filled after a batch like this one."""
    kernels, slots = triton

    def launches(layer: str, batch: Any) -> bool:
        base = torch.zeros(2, OUTPUTS)
        try:
            result = kernels.forward_with_base(
                lambda: base, OUTPUTS, torch.zeros(2, INPUTS).to(torch.int8), slots.layers[layer], batch
            )
        except AssertionError:  # x is of no type that the kernels take
            return True
        assert result is base
        return False

    slots.write(0, adapter(kernels, slots, "q"))
    slots.write(1, adapter(kernels, slots, "q", "o"))
    lengths = [1, 1]
    assert [launches(name, kernels.segments([0, NO_SLOT], lengths, None)) for name in ("q", "o")] == [True, False]
    assert [launches(name, kernels.segments([0, 1], lengths, None)) for name in ("q", "o")] == [True, True]
    slots.write(0, adapter(kernels, slots, "o"))
    assert [launches(name, kernels.segments([0, NO_SLOT], lengths, None)) for name in ("q", "o")] == [False, True]
    slots.clear(0)
    assert [launches(name, kernels.segments([0, NO_SLOT], lengths, None)) for name in ("q", "o")] == [False, False]
    # A captured graph serves what comes into the slots later.
    assert [launches(name, kernels.segments([0, NO_SLOT], lengths, "decode")) for name in ("q", "o")] == [True, True]


def test_batches_take_no_memory_that_was_not_reserved(triton: tuple[TritonKernels, Any]) -> None:
    kernels, _ = triton
    batches = [kernels.segments([0], [tokens], None) for tokens in (1, 256, 257, MAX_TOKENS)]
    batches.append(kernels.segments([0], [GRAPH_TOKENS], "decode"))
    kernels.reserve_decode_graphs(GRAPH_TOKENS)
    batches.append(kernels.segments([0], [1], "decode"))
    assert len({batch.scratch.h.data_ptr() for batch in batches}) == 1
    assert len({batch.table.tokens_T.data_ptr() for batch in batches}) == 3
    # More than SGLang said: served all the same.
    larger = kernels.segments([0], [MAX_TOKENS + 1], None)
    assert larger.table.max_tokens > MAX_TOKENS and larger.scratch is not batches[0].scratch


def test_what_is_reserved_is_counted(triton: tuple[TritonKernels, Any]) -> None:
    kernels, _ = triton
    reserved = kernels.reserve(SHAPES, BatchLimits(MAX_TOKENS, GRAPH_TOKENS))
    batch = kernels.segments([0], [MAX_TOKENS], None)
    assert reserved > batch.scratch.h.nbytes >= 4 * RANK * MAX_TOKENS
    assert kernels.reserve(SHAPES, BatchLimits(2 * MAX_TOKENS, GRAPH_TOKENS)) > reserved
    empty = TritonKernels(CPU, SLOTS)
    empty.allocate(SLOTS, {}, torch.float32)
    assert empty.reserve({}, BatchLimits(MAX_TOKENS, GRAPH_TOKENS)) == 0


@pytest.mark.parametrize("shape", [(8192, 1280), (1024, 8192), (8192, 7168), (3584, 8192)])
def test_every_configuration_is_compiled_before_the_first_request(shape: tuple[int, int]) -> None:
    """Those of 70B at TP 8: no batch size up to 4096 has one that none of the compiled sizes has."""
    known = TritonKernels(CPU, SLOTS)._configurations

    def chosen(tokens: int) -> object:
        block = known.block_tokens(tokens <= DECODE_TOKENS)
        tiles = SegmentTable(4096, SLOTS, block, CPU).max_tiles(tokens)
        return known.choose(Shape(tokens, tiles, *shape, block, 16, 1, 16))

    assert {chosen(tokens) for tokens in range(1, 4097)} == {chosen(tokens) for tokens in token_counts(4096)}


@pytest.mark.parametrize("exchanges", [False, True], ids=["communication-free", "fully-sharded"])
def test_what_a_batch_runs_was_compiled_before(exchanges: bool) -> None:
    """On a GPU that is absent, and without the other ranks, which may have other layers to compile."""
    pytest.importorskip("triton")
    from bdlora_kernels.triton_expand import expand_kernel
    from bdlora_kernels.triton_shrink import shrink_kernel
    from bdlora_perf.kernels.absent_gpu import absent_gpu

    def binaries() -> int:
        return sum(len(kernel.device_caches[80][0]) for kernel in (shrink_kernel, expand_kernel))

    ranks, done = (2 if exchanges else 1), []
    size = replace(SIZE, ranks=RANK // ranks, usual_rank=RANK // ranks, usual_ranks=RANK // ranks, gathered=ranks)
    with absent_gpu(80):
        kernels = TritonKernels(torch.device("meta"), SLOTS, exchanges)
        slots = kernels.allocate(SLOTS, dict.fromkeys(SHAPES, size), torch.bfloat16)
        kernels.reserve(SHAPES, BatchLimits(MAX_TOKENS, GRAPH_TOKENS))
        kernels.compile(lambda count, total: done.append((count, total)))
        compiled = binaries()
        assert done == [(1, 1)] and compiled >= 4
        sent: list[torch.Tensor] = []
        for tokens in (1, 3, 16, 17, 256, 300, MAX_TOKENS):
            x, y = (slots.zeros(tokens, size) for size in (INPUTS, OUTPUTS))

            def exchange(h_TR: torch.Tensor) -> torch.Tensor:
                sent.append(h_TR)
                return torch.cat([h_TR] * ranks)

            batch = kernels.segments([0], [tokens], graph="decode" if tokens <= GRAPH_TOKENS else None)
            operands = x, slots.layers["q"], replace(batch, active_layers=ALL_LAYERS)
            kernels.forward_with_base(lambda y=y: y, OUTPUTS, *operands, exchange if exchanges else None)
        assert binaries() == compiled
        assert [h.shape for h in sent] == ([(n, 2) for n in (1, 3, 16, 17, 256, 300, MAX_TOKENS)] if exchanges else [])
        # A layer that nobody's adapter holds: no rank waits for another.
        kernels.forward_with_base(lambda: y, OUTPUTS, x, slots.layers["q"], batch, exchange if exchanges else None)
        assert len(sent) in (0, 7)
