"""What the tests of the Triton kernels share: a layer on the device, and one checked run of it.

The tests run compiled on a GPU, else in Triton's interpreter, in processes that set TRITON_INTERPRET before they start.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bdlora_kernels import LayerFactors, PackedFactors, UnpackedSlice, pack
from bdlora_kernels.configurations import Configuration, device_configurations
from bdlora_kernels.tables import SegmentTable, SliceTables
from tests.kernels.test_eager import SLICES, Window, dense, fill_slots, make_packed, slot_elements, whole

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNNABLE = INTERPRETED or torch.cuda.is_available()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

Request = tuple[int, int]
POISON = float("nan")
MAX_SPLITS = 4
# Small blocks: many programs and many edges in small shapes.
SPLITS = Configuration(
    overlap=False,
    prefetch_b=False,
    pdl=False,
    splits=3,
    block_k=32,
    shrink_warps=4,
    shrink_stages=2,
    shrink_registers=255,
    tokens_at_once=8,
    block_o=32,
    block_r=16,
    expand_warps=4,
    expand_registers=255,
)
OVERLAP = replace(SPLITS, splits=2, overlap=True, prefetch_b=True)
NO_SPLITS = replace(SPLITS, splits=1, block_k=64, tokens_at_once=16, block_o=64, block_r=32)
CONFIGURATIONS = {"splits": SPLITS, "overlap": OVERLAP, "no-splits": NO_SPLITS}
# Slots of layers whose shrink outputs are gathered, and reduced.
SHARDED = {
    "gather": [SLICES["plain-rank16"], SLICES["qkv"], [], SLICES["qkv-without-q-and-with-two-blocks-of-v"], whole(1)],
    "reduce": [whole(16), whole(3), [], whole(40), whole(1)],
}


@dataclass
class Layer:
    """Factors on the device with their tables; ``unpacked`` stays on the CPU, for the reference."""

    factors: LayerFactors
    tables: SliceTables
    unpacked: list[list[UnpackedSlice]] = field(repr=False)


def make_layer(
    by_slot: Sequence[list[Window]], dtype: torch.dtype, seed: int = 0, usual_ranks: int | None = None
) -> Layer:
    return _layer_of(*make_packed(by_slot, dtype, seed), dtype, usual_ranks=usual_ranks)


def make_sharded_layer(
    by_slot: Sequence[list[Window]], dtype: torch.dtype, num_ranks: int, gathers: bool, seed: int = 0
) -> list[Layer]:
    """A layer as each TP rank has it when fully sharded, by the table in `bdlora_sglang.adapter.fully_sharded`.

    ``gathers``: rows of A and columns of h are cut, as in column-parallel layers; the outputs are one rank's. Else
    inputs and outputs are, as in row-parallel ones. ``unpacked`` is the whole.
    """
    _, unpacked = make_packed(by_slot, dtype, seed)
    layers = []
    for rank in range(num_ranks):
        own = [[_shard(part, rank, num_ranks, gathers) for part in parts] for parts in unpacked]
        packed = [pack(parts, num_ranks if gathers else 1) if parts else None for parts in own]
        layers.append(_layer_of(packed, unpacked, dtype, num_ranks if gathers else 1))
    return layers


def _shard(part: UnpackedSlice, rank: int, num_ranks: int, gathers: bool) -> UnpackedSlice:
    if not gathers:
        inputs, outputs = (cut(size, num_ranks, rank) for size in (part.a.shape[1], part.b.shape[0]))
        return UnpackedSlice(part.a[:, inputs].contiguous(), part.b[outputs].contiguous(), 0, 0, part.scaling)
    chunk = -(-len(part.a) // num_ranks)
    more = num_ranks * chunk - len(part.a)
    a_RI, b_OR = torch.nn.functional.pad(part.a, (0, 0, 0, more)), torch.nn.functional.pad(part.b, (0, more))
    return replace(part, a=a_RI[rank * chunk : (rank + 1) * chunk].contiguous(), b=b_OR)


def cut(size: int, parts: int, index: int) -> slice:
    return slice(size * index // parts, size * (index + 1) // parts)


def _layer_of(
    packed: Sequence[PackedFactors | None],
    unpacked: list[list[UnpackedSlice]],
    dtype: torch.dtype,
    gathered: int = 1,
    usual_ranks: int | None = None,
) -> Layer:
    room = (torch.empty(len(packed), elements, dtype=dtype, device=DEVICE) for elements in slot_elements(packed))
    factors = LayerFactors(*room, slices=[()] * len(packed))
    fill_slots(factors, packed)
    parts = [part for slices in factors.slices for part in slices]
    tables = SliceTables.allocate(
        num_slots=len(packed),
        usual_rank=parts[-1].rank,  # others may be larger, or smaller
        h_size=max(sum(part.rank for part in slices) for slices in factors.slices),
        device=DEVICE,
        usual_ranks=usual_ranks,
        gathered=gathered,
    )
    for slot, slices in enumerate(factors.slices):
        tables.write(slot, slices)
    return Layer(factors, tables, unpacked)


def segment_table(requests: Sequence[Request], num_slots: int, block_tokens: int = 16) -> SegmentTable:
    table = SegmentTable(max(sum(length for _, length in requests), 1), num_slots, block_tokens, DEVICE)
    table.fill([slot for slot, _ in requests], [length for _, length in requests])
    return table


def make_scratch(segments: SegmentTable, h_size: int, configuration: Configuration | None) -> Any:
    """Scratch memory that holds NaN, as large as a configuration needs it, or any that this device chooses."""
    from bdlora_kernels.launch import Scratch

    scratch = Scratch.for_segments(segments, device_configurations(DEVICE), h_size, DEVICE)
    if configuration is not None:
        scratch = Scratch.allocate(segments.max_tokens, h_size, segments.max_tokens * configuration.splits, DEVICE)
    scratch.h.fill_(POISON), scratch.partial.fill_(POISON)
    return scratch


def random_tokens(
    requests: Sequence[Request], inputs: int, outputs: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y on the CPU; what a token of the base model holds must not matter."""
    generator = torch.Generator().manual_seed(1)
    base_T = torch.tensor([slot < 0 for slot, length in requests for _ in range(length)], dtype=torch.bool)
    x_TI = torch.randn(len(base_T), inputs, generator=generator).to(dtype)
    x_TI[base_T] = POISON
    return x_TI, torch.randn(len(base_T), outputs, generator=generator).to(dtype)


def assert_close(
    result_TO: torch.Tensor,
    y_TO: torch.Tensor,
    x_TI: torch.Tensor,
    unpacked: list[list[UnpackedSlice]],
    requests: Sequence[Request],
    h_is_rounded: bool = False,
) -> None:
    """Compare with float64, element by element; what no slice writes must be as it was.

    ``h_is_rounded``: ranks have exchanged shrink outputs of y's type.
    """
    expected, magnitude, touched = dense(y_TO, x_TI, unpacked, list(requests))
    assert torch.equal(result_TO[~touched], y_TO[~touched]), "an output that no slice writes has changed"
    if not touched.any():
        return
    error = (result_TO.double() - expected)[touched]
    unit = torch.finfo(y_TO.dtype).eps / 2
    # y is rounded once, which errs by up to one unit of 16-bit types; the interpreter cuts bfloat16 off instead, by up
    # to two. h loses less than one more where it is multiplied. Sums in float32 are felt by float32 results alone:
    # 1.9 units are measured.
    sums = y_TO.dtype == torch.float32
    units = 5 if h_is_rounded else 3
    assert (error.abs() <= units * unit * (math.sqrt(x_TI.shape[1]) if sums else 1) * magnitude[touched]).all()
    relative_rms = error.square().mean().sqrt() / expected[touched].square().mean().sqrt()
    assert relative_rms <= unit * (3 if sums or h_is_rounded else 1), f"{relative_rms / unit:.2f} units"
