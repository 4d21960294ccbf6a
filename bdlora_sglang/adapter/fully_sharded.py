"""The part of a module that one rank holds in S-LoRA's fully sharded mode (S-LoRA, section 6.1; vLLM's
``--fully-sharded-loras``).

Both factors are cut into as many parts as there are ranks, whatever the adapter's blocks: a block-diagonal factor is
taken in its dense form. Between shrink and expand, the ranks exchange the shrink output.

| layer | A on rank p | exchange | B on rank p |
| --- | --- | --- | --- |
| column-parallel | rows of chunk p, all inputs | all-gather | the rank's output rows, all columns |
| row-parallel | all rows, the rank's input columns | all-reduce | output rows of chunk p, all columns |
"""

import torch

from bdlora_sglang.adapter.adapter import Adapter, LoRAModule
from bdlora_sglang.adapter.config import BlockSide
from bdlora_sglang.adapter.shard import ModuleShard, SliceFactors, block_range, even_cut, meet, read_window


def read_column_parallel(
    adapter: Adapter, module: LoRAModule, shard: ModuleShard, tp_rank: int, tp_size: int, dtype: torch.dtype
) -> SliceFactors:
    """Factors of a column-parallel module: ``a`` is ``(chunk, inputs)``, ``b`` is ``(outputs, tp_size * chunk)``.

    ``chunk`` is ``ceil(rank / tp_size)`` on every rank; where the rank runs out, A's rows and B's columns are zero.
    Raises `AdapterError` like `read_slice`.
    """
    chunk = -(-module.rank // tp_size)
    rows = range(min(tp_rank * chunk, module.rank), min((tp_rank + 1) * chunk, module.rank))
    a = torch.zeros(chunk, len(shard.inputs), dtype=dtype)
    a[: len(rows)] = _dense_a(adapter, module, rows, shard.inputs, dtype)
    b = torch.zeros(len(shard.outputs), tp_size * chunk, dtype=dtype)
    b[:, : module.rank] = _dense_b(adapter, module, shard.outputs, dtype)
    return SliceFactors(a, b, shard.input_offset, shard.output_offset, module.scaling)


def read_row_parallel(
    adapter: Adapter, module: LoRAModule, shard: ModuleShard, tp_rank: int, tp_size: int, dtype: torch.dtype
) -> SliceFactors:
    """Factors of a row-parallel module: ``a`` is ``(rank, inputs)``, ``b`` is ``(outputs of chunk p, rank)``.

    Raises `AdapterError` like `read_slice`.
    """
    outputs = even_cut(module.out_features, tp_size, tp_rank)
    a = _dense_a(adapter, module, range(module.rank), shard.inputs, dtype)
    b = _dense_b(adapter, module, outputs, dtype)
    return SliceFactors(a, b, shard.input_offset, shard.output_offset + outputs.start, module.scaling)


def _dense_a(adapter: Adapter, module: LoRAModule, rows: range, columns: range, dtype: torch.dtype) -> torch.Tensor:
    nblocks = module.nblocks if module.side is BlockSide.A else 1
    return _dense(adapter, module.tensor_a, (module.rank, module.in_features), nblocks, rows, columns, dtype)


def _dense_b(adapter: Adapter, module: LoRAModule, rows: range, dtype: torch.dtype) -> torch.Tensor:
    nblocks = module.nblocks if module.side is BlockSide.B else 1
    shape = (module.out_features, module.rank)
    return _dense(adapter, module.tensor_b, shape, nblocks, rows, range(module.rank), dtype)


def _dense(
    adapter: Adapter,
    name: str,
    shape: tuple[int, int],
    nblocks: int,
    rows: range,
    columns: range,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``block_diag(*chunk(stored, nblocks))[rows, columns]`` for the dense ``shape``; reads what is not zero."""
    dense = torch.zeros(len(rows), len(columns), dtype=dtype)
    for block in range(nblocks):
        block_rows = meet(rows, block_range(shape[0], nblocks, block))
        block_columns = block_range(shape[1], nblocks, block)
        met = meet(columns, block_columns)
        if block_rows and met:
            stored = range(met.start - block_columns.start, met.stop - block_columns.start)
            part = read_window(adapter, name, block_rows, stored, dtype)
            dense[_within(block_rows, rows), _within(met, columns)] = part
    return dense


def _within(inner: range, outer: range) -> slice:
    return slice(inner.start - outer.start, inner.stop - outer.start)
