"""The part of an adapter that one tensor-parallel rank needs, for any block count on any TP degree.

A rank owns a window of a module's input features and a window of its output features: all inputs and some outputs of a
column-parallel layer, some inputs and all outputs of a row-parallel one. It needs the blocks that meet its windows, and
of each block just the meeting part. Each such part is a small LoRA of its own, a *slice*: it reads a window of the
rank's input and adds to a window of the rank's output. A plain adapter has one block; the rule is the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bdlora_sglang.adapter.adapter import Adapter, LoRAModule
from bdlora_sglang.adapter.checkpoint import all_finite
from bdlora_sglang.adapter.config import BlockSide
from bdlora_sglang.errors import AdapterError


@dataclass(frozen=True)
class ModuleShard:
    """The window of one module that a rank owns.

    ``inputs`` and ``outputs`` are ranges of the module's own features, without padding; feature ``i`` of ``inputs``
    stands at ``input_offset + i - inputs.start`` of the rank's input, and outputs likewise.
    """

    inputs: range
    outputs: range
    input_offset: int = 0
    output_offset: int = 0


@dataclass(frozen=True)
class LoRASlice:
    """A LoRA from a window of the rank's input to a window of its output, and where its factors are stored.

    A is ``checkpoint[tensor_a][a_rows, a_columns]``, shape ``(rank, input_size)``; B is
    ``checkpoint[tensor_b][b_rows, b_columns]``, shape ``(output_size, rank)``.
    """

    tensor_a: str
    tensor_b: str
    a_rows: range
    a_columns: range
    b_rows: range
    b_columns: range
    input_start: int
    output_start: int
    scaling: float

    @property
    def rank(self) -> int:
        return len(self.a_rows)

    @property
    def input_size(self) -> int:
        return len(self.a_columns)

    @property
    def output_size(self) -> int:
        return len(self.b_rows)

    @property
    def num_parameters(self) -> int:
        return self.rank * (self.input_size + self.output_size)


@dataclass(frozen=True)
class SliceFactors:
    """The weights of one slice: ``a`` is ``(rank, input_size)``, ``b`` is ``(output_size, rank)``, both contiguous."""

    a: torch.Tensor
    b: torch.Tensor
    input_start: int
    output_start: int
    scaling: float


def slice_module(module: LoRAModule, shard: ModuleShard) -> list[LoRASlice]:
    """The slices of ``module`` that meet ``shard``, in block order. Their ranks add up to the module's local rank."""
    return list(_meeting_blocks(module, shard))


def _meeting_blocks(module: LoRAModule, shard: ModuleShard) -> Iterator[LoRASlice]:
    rank = module.block_rank
    for block in range(module.nblocks):
        inputs, outputs = shard.inputs, shard.outputs
        own = range(block * rank, (block + 1) * rank)
        stored_columns, stored_rank = inputs, own
        if module.side is BlockSide.A:
            inputs = meet(shard.inputs, block_range(module.in_features, module.nblocks, block))
            first = block * (module.in_features // module.nblocks)
            stored_columns = range(inputs.start - first, inputs.stop - first)
        elif module.side is BlockSide.B:
            outputs = meet(shard.outputs, block_range(module.out_features, module.nblocks, block))
            stored_rank = range(rank)
        if inputs and outputs:
            yield LoRASlice(
                tensor_a=module.tensor_a,
                tensor_b=module.tensor_b,
                a_rows=module.a_rows(own),
                a_columns=stored_columns,
                b_rows=outputs,
                b_columns=module.b_columns(stored_rank),
                input_start=shard.input_offset + inputs.start - shard.inputs.start,
                output_start=shard.output_offset + outputs.start - shard.outputs.start,
                scaling=module.scaling,
            )


def read_slice(adapter: Adapter, part: LoRASlice, dtype: torch.dtype) -> SliceFactors:
    """Read the slice's factors as ``dtype``, and nothing else of the adapter.

    Raises:
        AdapterError: NaN or infinity, also when a value is too large for ``dtype``.
    """
    a = read_window(adapter, part.tensor_a, part.a_rows, part.a_columns, dtype)
    b = read_window(adapter, part.tensor_b, part.b_rows, part.b_columns, dtype)
    return SliceFactors(a, b, part.input_start, part.output_start, part.scaling)


def read_window(adapter: Adapter, name: str, rows: range, columns: range, dtype: torch.dtype) -> torch.Tensor:
    """``checkpoint[name][rows, columns]`` as ``dtype``; raises `AdapterError` like `read_slice`."""
    stored = adapter.checkpoint.read(name, rows, columns)
    tensor = stored.to(dtype)
    if torch.finfo(stored.dtype).max > torch.finfo(dtype).max and not all_finite(tensor):
        largest = stored.abs().max().item()
        raise AdapterError(
            adapter.checkpoint.source, f"tensor '{name}'", f"a value of {largest}", f"the range of {dtype}"
        )
    return tensor


def column_shard(module: LoRAModule, tp_size: int, tp_rank: int) -> ModuleShard:
    """The shard of an evenly cut column-parallel layer. A server asks its layers instead: they may pad or replicate."""
    return ModuleShard(range(module.in_features), even_cut(module.out_features, tp_size, tp_rank))


def row_shard(module: LoRAModule, tp_size: int, tp_rank: int) -> ModuleShard:
    """The shard of an evenly cut row-parallel layer."""
    return ModuleShard(even_cut(module.in_features, tp_size, tp_rank), range(module.out_features))


def even_cut(size: int, parts: int, index: int) -> range:
    """Part ``index`` of ``size`` features cut into ``parts`` that differ by one feature at most."""
    return range(size * index // parts, size * (index + 1) // parts)


def block_range(size: int, nblocks: int, block: int) -> range:
    """The features of one block; ``nblocks`` divides ``size``."""
    return range(block * (size // nblocks), (block + 1) * (size // nblocks))


def meet(a: range, b: range) -> range:
    """The intersection, empty where there is none."""
    return range(max(a.start, b.start), max(min(a.stop, b.stop), a.start, b.start))
