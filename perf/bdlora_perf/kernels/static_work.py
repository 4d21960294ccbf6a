"""What each kernel has to do at a case, by its constants: programs, steps, bytes and operations for the latency model.

Sizes are those of 16-bit types. What a kernel reads before its first product is read from its machine code instead.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import ceil, prod

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


class Batch:
    """A case in numbers: ``counts`` tokens of each adapter, ``ranks`` of all slices of an adapter together.

    Bytes are those of an adapter's A and B, of x, and of y, which is read and written.
    """

    def __init__(self, case: Case) -> None:
        shape = case.shape()
        self.counts = tuple(Counter(case.slots()).values())
        self.tokens, self.adapters, self.rank = case.tokens, case.adapters, case.rank
        self.inputs, self.widths, self.outputs = shape.inputs, shape.outputs, shape.total_outputs
        self.ranks = self.rank * len(self.widths)
        self.a_bytes = self.ranks * self.inputs * _ELEMENT
        self.b_bytes = self.rank * self.outputs * _ELEMENT
        self.x_bytes = self.tokens * self.inputs * _ELEMENT
        self.y_bytes = 2 * self.tokens * self.outputs * _ELEMENT

    def tiles(self, block: int) -> int:
        return sum(ceil(count / block) for count in self.counts)


def works_of(launched: Sequence[Launched], case: Case, all_slots: bool) -> list[Work]:
    """What each launch has to do; with ``all_slots`` the product with the A of all slots comes first."""
    batch = Batch(case)
    works = [_work_of(one, batch, before) for before, one in zip((None, *launched), launched, strict=False)]
    return [_all_slots(batch), *works] if all_slots else works


def _work_of(launched: Launched, batch: Batch, before: Launched | None) -> Work:
    name = launched.code.name
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
    chain = loads_before_product(launched.code, cold)
    return replace(work, chain=chain, code=launched.code, grid=prod(launched.grid))


def _all_slots(batch: Batch) -> Work:
    """The product of x with the A of all slots by cuBLAS: as good as its bytes allow."""
    factors, columns = batch.adapters * batch.a_bytes, batch.adapters * batch.ranks
    return Work(
        programs=1,
        chain=Chain(memory=1),
        memory_bytes=factors,
        requested_bytes=factors + batch.x_bytes + batch.tokens * columns * _ELEMENT,
        activation_bytes=batch.x_bytes,
        operations=2.0 * max(batch.tokens, 16) * columns * batch.inputs,
    )


def _shrink(
    batch: Batch,
    tile: int,
    rows: int,
    block_k: int,
    splits: int = 1,
    depth: int = 1,
    sums: bool = False,
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
        memory_bytes=len(batch.counts) * batch.a_bytes,
        requested_bytes=tiles * batch.a_bytes + blocks * batch.x_bytes + planes,
        activation_bytes=batch.x_bytes,
        operations=2.0 * tiles * tile * blocks * rows * batch.inputs,
        more_memory=(steps - 1) / depth,
        more_l2=after,
        longest_l2=after,
    )


def _expand(
    batch: Batch, tile: int, block_n: int, block_k: int, depth: int = 1, planes: int = 1, after: float = 0.0
) -> Work:
    """A kernel that multiplies ``tile`` tokens' h with ``block_n`` rows of B, in steps of ``block_k`` ranks."""
    tiles, columns = batch.tiles(tile), sum(ceil(width / block_n) for width in batch.widths)
    steps = ceil(batch.rank / block_k)
    h_bytes = batch.tokens * batch.rank * (_ELEMENT if planes == 1 else _FLOAT * planes)
    return Work(
        programs=tiles * columns,
        memory_bytes=len(batch.counts) * batch.b_bytes,
        requested_bytes=tiles * batch.b_bytes + columns * h_bytes + batch.y_bytes,
        activation_bytes=batch.y_bytes,
        operations=2.0 * tiles * tile * columns * block_n * steps * max(16, block_k),
        more_memory=(steps - 1) / depth,
        more_l2=after,
        longest_l2=after,
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
    return Work(
        programs=blocks * tiles,
        memory_bytes=len(batch.counts) * batch.b_bytes,
        requested_bytes=tiles * batch.b_bytes + h_bytes + batch.y_bytes,
        activation_bytes=batch.y_bytes,
        # h goes in as two numbers of 16 bits.
        operations=2.0 * 2 * sum(turns) * max(at_once, 8) * sum(slices) * block * steps * ranks,
        more_memory=max(slices) * steps - 1,
        # Reads of h and y in the turns behind a tile's first: their B is in the first-level cache.
        more_l2=(sum(turns) / tiles - 1) * (sum(slices) / blocks) * steps,
        longest_l2=(max(turns) - 1) * max(slices) * steps,
    )


def _their_shrink(launched: Launched, batch: Batch) -> Work:
    given = launched.arguments
    tokens, rows, block_k = _block_sizes(given)
    # A loop over the inputs of one token is not pipelined.
    depth = 1 if tokens == 1 else max(1, launched.code.stages - 1)
    serial = given.get("SPLIT_MODE") == "serial"
    return _shrink(batch, tokens, rows, block_k, given.get("SPLIT_K", 1), depth, sums=serial)


def _their_expand(launched: Launched, batch: Batch) -> Work:
    given, sizes = launched.arguments, _block_sizes(launched.arguments)
    if "PLANES" in given:
        return _expand(batch, *sizes, planes=given["PLANES"])
    # csgmv and triton read y behind the product.
    return _expand(batch, *sizes, depth=launched.code.stages - 1, after=1.0)


def _block_sizes(given: Mapping[str, int]) -> tuple[int, int, int]:
    """Tokens, rows and columns of a tile, by SGLang's names; a kernel without the first has one token a program."""
    tokens = next((given[name] for name in ("BLOCK_SIZE_M", "BLOCK_M", "BLOCK_S") if name in given), 1)
    rows, columns = (given[f"BLOCK_SIZE_{side}" if f"BLOCK_SIZE_{side}" in given else f"BLOCK_{side}"] for side in "NK")
    return tokens, rows, columns


_KERNELS: Mapping[str, Callable[[Launched, Batch], Work]] = {
    "shrink_kernel": _our_shrink,
    "expand_kernel": _our_expand,
    "_grouped_lora_a_kernel": _their_shrink,
    "_grouped_lora_b_kernel": _their_expand,
    "_per_row_lora_a_kernel": _their_shrink,
    "_per_row_lora_b_kernel": _their_expand,
    "_chunked_lora_shrink_kernel": _their_shrink,
    "_chunked_lora_expand_kernel": _their_expand,
    "_sgemm_lora_a_kernel": _their_shrink,
    "_sgemm_lora_b_kernel": _their_expand,
    "_qkv_lora_b_kernel": _their_expand,
    "_gate_up_lora_b_kernel": _their_expand,
}
