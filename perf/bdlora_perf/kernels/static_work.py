"""What each kernel has to do at a case, by its constants: programs, steps, bytes and operations for the latency model.

Sizes are those of 16-bit types. What a kernel reads before its first product is read from its machine code instead.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import ceil

from bdlora_perf.kernels.absent_gpu import Launched
from bdlora_perf.kernels.dependent_loads import Chain, loads_before_product
from bdlora_perf.kernels.latency import Work
from bdlora_perf.kernels.shapes import Case

_ELEMENT, _FLOAT = 2, 4
# To write a partial sum, to count, and to read what the others have written: three steps in the second-level cache.
_SUM_OF_SPLITS = 3.0
# A kernel's pointers to what the base layer's weights drive out of the cache between two uses.
_FACTORS = frozenset({"a_ptr", "b_ptr", "weight_ptr", "weights"})
_OWN_TABLES = frozenset({"entries_ptr"})


@dataclass(frozen=True)
class Batch:
    """A case in numbers: ``counts`` tokens of each adapter, ``ranks`` of all slices of an adapter together."""

    counts: tuple[int, ...]
    tokens: int
    inputs: int
    widths: tuple[int, ...]
    rank: int

    @classmethod
    def of(cls, case: Case) -> "Batch":
        shape = case.shape()
        return cls(tuple(Counter(case.slots()).values()), case.tokens, shape.inputs, shape.outputs, case.rank)

    @property
    def ranks(self) -> int:
        return self.rank * len(self.widths)

    @property
    def outputs(self) -> int:
        return sum(self.widths)

    @property
    def a_bytes(self) -> int:
        """Of one adapter."""
        return self.ranks * self.inputs * _ELEMENT

    @property
    def b_bytes(self) -> int:
        """Of one adapter."""
        return self.rank * self.outputs * _ELEMENT

    @property
    def x_bytes(self) -> int:
        return self.tokens * self.inputs * _ELEMENT

    @property
    def y_bytes(self) -> int:
        """Read and written."""
        return 2 * self.tokens * self.outputs * _ELEMENT

    def tiles(self, block: int) -> int:
        return sum(ceil(count / block) for count in self.counts)


def work_of(launched: Launched, case: Case, before: Launched | None) -> Work:
    """What a launch has to do; ``before`` is the launch before it, of the same system."""
    batch, name = Batch.of(case), launched.code.name
    if name not in _KERNELS:
        raise ValueError(f"found the kernel {name}, expected one of {sorted(_KERNELS)}")
    work, cold = _KERNELS[name](launched, batch), _FACTORS | _OWN_TABLES
    if name == "expand_kernel" and before is not None:
        # Our shrink may have brought the rows of the table, and B, to the cache.
        if before.arguments["PREFETCH"]:
            cold -= {"entries_ptr"}
        if before.arguments["PREFETCH_B"]:
            cold -= {"b_ptr"}
            work = replace(work, memory_bytes=0, fetched_bytes=work.memory_bytes, more_memory=0,
                           more_l2=work.more_l2 + work.more_memory,
                           longest_l2=work.longest_l2 + work.more_memory)  # fmt: skip
    return replace(work, chain=loads_before_product(launched.code, cold))


def all_slots_work(case: Case) -> Work:
    """The product of x with the A of all slots by cuBLAS: as good as its bytes allow."""
    batch = Batch.of(case)
    factors = case.adapters * batch.a_bytes
    h_bytes = batch.tokens * case.adapters * batch.ranks * _ELEMENT
    operations = 2.0 * max(batch.tokens, 16) * case.adapters * batch.ranks * batch.inputs
    requested = factors + batch.x_bytes + h_bytes
    return Work(1, Chain(memory=1), 0, 0, 0, factors, 0, requested, batch.x_bytes, operations)


def _shrink(
    batch: Batch,
    tile: int,
    rows: int,
    block_k: int,
    splits: int,
    depth: int,
    sums: bool,
    turns: int = 1,
    h_bytes: int = _ELEMENT,
) -> Work:
    """A kernel that multiplies ``tile`` tokens with ``rows`` rows of A, in steps of ``block_k`` of a split's inputs.

    ``h_bytes``: of an element of h where nothing is summed up.
    """
    tiles, blocks = batch.tiles(tile), ceil(batch.ranks / rows)
    steps = ceil(ceil(batch.inputs / splits) / block_k) * turns
    after = _SUM_OF_SPLITS if sums and splits > 1 else 0.0
    planes = batch.tokens * batch.ranks * (_FLOAT * splits * (2 if sums else 1) if splits > 1 else h_bytes)
    return Work(
        programs=tiles * ceil(blocks / turns) * splits,
        chain=Chain(),
        more_memory=(steps - 1) / depth,
        more_l2=after,
        longest_l2=after,
        memory_bytes=len(batch.counts) * batch.a_bytes,
        fetched_bytes=0,
        requested_bytes=tiles * batch.a_bytes + blocks * batch.x_bytes + planes,
        activation_bytes=batch.x_bytes,
        operations=2.0 * tiles * tile * blocks * rows * batch.inputs,
    )


def _expand(
    batch: Batch, tile: int, block_n: int, block_k: int, depth: int, planes: int = 1, after: float = 0.0
) -> Work:
    """A kernel that multiplies ``tile`` tokens' h with ``block_n`` rows of B, in steps of ``block_k`` ranks."""
    tiles, columns = batch.tiles(tile), sum(ceil(width / block_n) for width in batch.widths)
    steps = ceil(batch.rank / block_k)
    h_bytes = batch.tokens * batch.rank * (_ELEMENT if planes == 1 else _FLOAT * planes)
    return Work(
        programs=tiles * columns,
        chain=Chain(),
        more_memory=(steps - 1) / depth,
        more_l2=after,
        longest_l2=after,
        memory_bytes=len(batch.counts) * batch.b_bytes,
        fetched_bytes=0,
        requested_bytes=tiles * batch.b_bytes + columns * h_bytes + batch.y_bytes,
        activation_bytes=batch.y_bytes,
        operations=2.0 * tiles * tile * columns * block_n * steps * max(16, block_k),
    )


def _our_shrink(launched: Launched, batch: Batch) -> Work:
    given = launched.arguments
    rows, programs = given["BLOCK_R"], launched.grid[1]
    turns = ceil(ceil(batch.ranks / rows) / programs)
    depth = max(1, given["STAGES"] - 1)
    block, splits = given["BLOCK_K"], given["SPLITS"]
    work = _shrink(batch, given["BLOCK_T"], rows, block, splits, depth, sums=True, turns=turns, h_bytes=_FLOAT)
    if given["PREFETCH_B"]:
        fetched = len(batch.counts) * batch.b_bytes
        work = replace(work, memory_bytes=work.memory_bytes + fetched, requested_bytes=work.requested_bytes + fetched)
    return work


def _our_expand(launched: Launched, batch: Batch) -> Work:
    given = launched.arguments
    block, at_once, ranks = given["BLOCK_O"], given["BLOCK_T"], given["BLOCK_R"]
    # A tile is of 16 tokens or, in prefill, of 32, of which some are multiplied at once: more turns for full tiles.
    tile = max(at_once, 16)
    turns = [ceil(min(tile, count - first) / at_once) for count in batch.counts for first in range(0, count, tile)]
    blocks, tiles = ceil(batch.outputs / block), len(turns)
    starts = [sum(batch.widths[:i]) for i in range(len(batch.widths) + 1)]
    # Blocks of outputs may reach over the bound between two slices, which then follow each other.
    slices = [
        sum(start < (i + 1) * block and stop > i * block for start, stop in pairwise(starts)) for i in range(blocks)
    ]
    steps: int = ceil(batch.rank / ranks)
    h_bytes = blocks * batch.tokens * batch.rank * _FLOAT

    def further(turns_of_tile: float, slices_of_block: float) -> float:
        """Reads of h and y in the turns behind the first: their B is in the first-level cache."""
        return (turns_of_tile - 1) * slices_of_block * steps

    mean_turns, mean_slices = sum(turns) / tiles, sum(slices) / blocks
    return Work(
        programs=blocks * tiles,
        chain=Chain(),
        more_memory=max(slices) * steps - 1,
        more_l2=further(mean_turns, mean_slices),
        longest_l2=further(max(turns), max(slices)),
        memory_bytes=len(batch.counts) * batch.b_bytes,
        fetched_bytes=0,
        requested_bytes=tiles * batch.b_bytes + h_bytes + batch.y_bytes,
        activation_bytes=batch.y_bytes,
        # h goes in as two numbers of 16 bits.
        operations=2.0 * 2 * sum(turns) * max(at_once, 8) * sum(slices) * block * steps * ranks,
    )


def _grouped_a(launched: Launched, batch: Batch) -> Work:
    given = launched.arguments
    splits, sums = given["SPLIT_K"], given["SPLIT_MODE"] == "serial"
    depth = max(1, launched.code.stages - 1)
    return _shrink(batch, given["BLOCK_SIZE_M"], given["BLOCK_SIZE_N"], given["BLOCK_SIZE_K"], splits, depth, sums=sums)


def _grouped_b(launched: Launched, batch: Batch) -> Work:
    given = launched.arguments
    return _expand(
        batch, given["BLOCK_SIZE_M"], given["BLOCK_SIZE_N"], given["BLOCK_SIZE_K"], 1, planes=given["PLANES"]
    )


def _one_token_each(batch: Batch) -> Batch:
    return replace(batch, counts=(1,) * batch.tokens)


def _per_row_a(launched: Launched, batch: Batch) -> Work:
    given = launched.arguments
    work = _shrink(_one_token_each(batch), 1, given["BLOCK_SIZE_N"], given["BLOCK_SIZE_K"], 1, 1, sums=False)
    return replace(work, memory_bytes=len(batch.counts) * batch.a_bytes)


def _per_row_b(launched: Launched, batch: Batch) -> Work:
    given = launched.arguments
    work = _expand(_one_token_each(batch), 1, given["BLOCK_SIZE_N"], given["BLOCK_SIZE_K"], 1, planes=given["PLANES"])
    return replace(work, memory_bytes=len(batch.counts) * batch.b_bytes)


def _segment_shrink(tokens: str, launched: Launched, batch: Batch) -> Work:
    """``tokens`` names the constant of how many a tile has."""
    given, depth = launched.arguments, launched.code.stages - 1
    return _shrink(batch, given[tokens], given["BLOCK_N"], given["BLOCK_K"], 1, depth, sums=False)


def _segment_expand(tokens: str, launched: Launched, batch: Batch) -> Work:
    # It reads y behind the product.
    given, depth = launched.arguments, launched.code.stages - 1
    return _expand(batch, given[tokens], given["BLOCK_N"], given["BLOCK_K"], depth, after=1.0)


_KERNELS: Mapping[str, Callable[[Launched, Batch], Work]] = {
    "shrink_kernel": _our_shrink,
    "expand_kernel": _our_expand,
    "_grouped_lora_a_kernel": _grouped_a,
    "_grouped_lora_b_kernel": _grouped_b,
    "_per_row_lora_a_kernel": _per_row_a,
    "_per_row_lora_b_kernel": _per_row_b,
    "_chunked_lora_shrink_kernel": partial(_segment_shrink, "BLOCK_M"),
    "_chunked_lora_expand_kernel": partial(_segment_expand, "BLOCK_M"),
    "_sgemm_lora_a_kernel": partial(_segment_shrink, "BLOCK_S"),
    "_sgemm_lora_b_kernel": partial(_segment_expand, "BLOCK_S"),
    "_qkv_lora_b_kernel": partial(_segment_expand, "BLOCK_S"),
    "_gate_up_lora_b_kernel": partial(_segment_expand, "BLOCK_S"),
}
