"""Layers whose launches are compiled for GPUs that are absent: sizes as served, on PyTorch's "meta" device."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bdlora_kernels.configurations import Configuration, load_configurations
from bdlora_kernels.launch import (
    Launch,
    Scratch,
    expand_launch,
    forward_with_base,
    lookup_launch,
    shape_of,
    shrink_launch,
)
from bdlora_kernels.layout import LayerFactors
from bdlora_kernels.tables import SegmentTable, SliceTables
from bdlora_perf.kernels.absent_gpu import Launched, absent_gpu

META = torch.device("meta")


@dataclass(frozen=True)
class Layer:
    """One layer of a batch; ``slices`` share the inputs, and have ``rank`` each, on each of ``gathered`` TP ranks."""

    tokens: int
    slots: int
    inputs: int
    outputs: int
    slices: int
    rank: int
    dtype: torch.dtype = torch.bfloat16
    decode: bool = True
    deterministic: bool = False
    gathered: int = 1
    exchanged: bool = False


def configuration_of(layer: Layer, capability: int) -> Configuration:
    return _prepare(layer, capability)[0]


def launches(layer: Layer, capability: int) -> list[Launch]:
    """The shrink and the expand."""
    configuration, x, y, factors, tables, segments, scratch = _prepare(layer, capability)
    h = scratch.h_TR(layer.tokens, tables.h_size)
    return [
        shrink_launch(h, x, factors, tables, segments, scratch.partial, configuration),
        expand_launch(y, h, factors.b_SE, tables.expand, segments, configuration),
    ]


def _prepare(layer: Layer, capability: int) -> tuple[Any, ...]:
    configurations = load_configurations(capability, layer.deterministic)
    tables = SliceTables.allocate(layer.slots, layer.rank, layer.rank * layer.slices, META, layer.gathered)
    segments = SegmentTable(layer.tokens, layer.slots, configurations.block_tokens(layer.decode), META)
    x, y = (torch.empty(layer.tokens, n, dtype=layer.dtype, device=META) for n in (layer.inputs, layer.outputs))
    elements = layer.rank * (layer.slices * layer.inputs + layer.gathered * layer.outputs)
    slots = torch.empty(layer.slots, elements, dtype=layer.dtype, device=META)
    factors = LayerFactors(slots, slots, [()] * layer.slots)
    scratch = Scratch.for_segments(segments, configurations, tables.h_size, META)
    configuration = configurations.choose(shape_of(x, layer.outputs, tables, segments, layer.exchanged))
    return configuration, x, y, factors, tables, segments, scratch


def compiled(layer: Layer, capability: int) -> list[Launched]:
    with absent_gpu(capability) as launched:
        for launch in launches(layer, capability):
            launch.run()
    return launched


def compiled_with_exchange(layer: Layer, capability: int) -> list[Launched]:
    """Of a fully sharded layer, all that is called between its input and its output.

    Nothing has a value on the meta device, so none of it can wait for one.
    """
    configuration, x, y, factors, tables, segments, scratch = _prepare(layer, capability)

    def exchange(h_TR: torch.Tensor) -> torch.Tensor:
        assert h_TR.dtype == layer.dtype
        return h_TR.new_empty(layer.gathered * layer.tokens, h_TR.shape[1])

    with absent_gpu(capability) as launched:
        operands = x, factors, tables, segments, scratch, configuration
        forward_with_base(lambda: y, layer.outputs, *operands, exchange=exchange)
    return launched


def compiled_lookup(layer: Layer, capability: int) -> Launched:
    """Of an embedding of ``inputs`` tokens."""
    _, _, _, factors, tables, segments, scratch = _prepare(layer, capability)
    ids = torch.empty(layer.tokens, dtype=torch.int64, device=META)
    with absent_gpu(capability) as launched:
        h = scratch.h_TR(layer.tokens, tables.h_size)
        lookup_launch(h, ids, 17, factors.a_SE, tables.shrink, segments).run()
    (only,) = launched
    return only


def layers_in_use(dtype: torch.dtype) -> Iterator[Layer]:
    """Layers that reach the kernels that the formula chooses: all sizes of blocks, both phases, many and few inputs,
    outputs and splits, wide and narrow loads."""
    for rank, slices in ((4, 1), (8, 3), (32, 3)):
        yield Layer(64, 32, 1024, 8192, slices, rank, dtype)
        yield Layer(8192, 8, 1024, 8192, slices, rank, dtype, decode=False)
    yield Layer(64, 32, 1024, 8192, 1, 2, dtype)
    yield Layer(64, 32, 3584, 8192, 1, 64, dtype)
    yield Layer(64, 32, 8192, 1280, 3, 4, dtype)
    yield Layer(1, 8, 8192, 1280, 3, 32, dtype)
