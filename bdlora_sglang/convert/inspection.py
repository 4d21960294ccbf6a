"""What an adapter is, and what it takes of each GPU's memory in three ways of serving it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bdlora_sglang.adapter import Adapter, BlockSide, LoRAModule, slice_module
from bdlora_sglang.adapter.shard import column_shard, row_shard
from bdlora_sglang.convert.sides import TPSide, known_side

TP_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class BytesPerGPU:
    """Bytes of an adapter on the GPU that holds most, at one TP degree.

    Attributes:
        communication_free: BD-LoRA serving: each rank holds the parts of blocks that meet its shard.
        replicated: SGLang's own LoRA: A of column-parallel and B of row-parallel modules whole on every rank. A
            block-diagonal adapter is first a plain one, of its whole rank.
        fully_sharded: S-LoRA: both factors cut over the ranks; less memory, and a collective per module.
    """

    tp_size: int
    communication_free: int
    replicated: int
    fully_sharded: int


@dataclass(frozen=True)
class AdapterSummary:
    """``sides`` maps the last part of the modules' names to their TP side; None where the table has no such name."""

    folder: Path
    kind: str
    nblocks: int
    ranks: tuple[int, ...]
    dtypes: tuple[str, ...]
    modules: Mapping[str, LoRAModule]
    sides: Mapping[str, TPSide | None]
    num_parameters: int
    bytes_per_gpu: tuple[BytesPerGPU, ...]
    base_model: str | None


def inspect_adapter(folder: str | Path, tp_sizes: Sequence[int] = TP_SIZES) -> AdapterSummary:
    """Describe an adapter from its config and its header; no weights are read.

    Modules whose side the table does not know count as whole on every rank.

    Raises:
        AdapterError: the adapter cannot be used.
    """
    adapter = Adapter.open(folder)
    modules = adapter.modules.values()
    dtypes = {adapter.checkpoint.dtype(t) for m in modules for t in (m.tensor_a, m.tensor_b)}
    return AdapterSummary(
        folder=Path(folder),
        kind=adapter.kind,
        nblocks=adapter.nblocks,
        ranks=tuple(sorted({module.rank for module in modules})),
        dtypes=tuple(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)),
        modules=adapter.modules,
        sides={module.name.rpartition(".")[2]: tp_side(module) for module in modules},
        num_parameters=adapter.num_parameters,
        bytes_per_gpu=tuple(_bytes_per_gpu(adapter, tp_size) for tp_size in tp_sizes),
        base_model=adapter.config.raw.get("base_model_name_or_path"),
    )


def tp_side(module: LoRAModule) -> TPSide | None:
    """By the block-diagonal factor, or by the name when there is none; ranks own parts of an embedding's inputs."""
    if module.is_embedding:
        return TPSide.ROW
    if module.side is BlockSide.NONE:
        return known_side(module.name)
    return TPSide.ROW if module.side is BlockSide.A else TPSide.COLUMN


def _bytes_per_gpu(adapter: Adapter, tp_size: int) -> BytesPerGPU:
    local = [0] * tp_size
    replicated = sharded = 0
    for module in adapter.modules.values():
        size = adapter.checkpoint.dtype(module.tensor_a).itemsize
        side = tp_side(module)
        inputs, outputs = (
            module.rank * module.in_features,
            module.rank * module.out_features,
        )
        if side is None:
            local = [held + size * module.num_parameters for held in local]
            replicated += size * (inputs + outputs)
            sharded += size * (inputs + outputs)
            continue
        cut = column_shard if side is TPSide.COLUMN else row_shard
        for rank in range(tp_size):
            local[rank] += size * sum(s.num_parameters for s in slice_module(module, cut(module, tp_size, rank)))
        whole, split = (inputs, outputs) if side is TPSide.COLUMN else (outputs, inputs)
        replicated += size * (whole + -(-split // tp_size))
        sharded += size * (-(-whole // tp_size) + -(-split // tp_size))
    return BytesPerGPU(tp_size, max(local), replicated, sharded)
