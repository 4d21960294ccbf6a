"""The tables that the kernels read, and the configurations that they are launched with; figures worked out by hand."""

from dataclasses import replace

import pytest
import torch

from bdlora_kernels import Slice
from bdlora_kernels.configurations import (
    Configurations,
    Shape,
    by_formula,
    device_configurations,
    format_configurations,
    parse_configurations,
)
from bdlora_kernels.tables import ExpandSlice, SegmentTable, ShrinkGroup, SliceTables, expand_slices, shrink_groups

CPU = torch.device("cpu")
# q and k of one block, and v of two, of which the second reads a window.
SLICES = (
    Slice(0, 64, 0, 32, rank=20, a_offset=0, b_offset=0, scaling=2.0),
    Slice(0, 64, 32, 8, rank=3, a_offset=1280, b_offset=640, scaling=0.5),
    Slice(8, 40, 40, 8, rank=5, a_offset=1472, b_offset=664, scaling=-1.0),
)


def test_slices_with_the_same_inputs_shrink_together() -> None:
    assert shrink_groups(SLICES) == [ShrinkGroup(0, 64, 23, 0, 0), ShrinkGroup(8, 40, 5, 1472, 23)]
    assert expand_slices(SLICES) == [
        ExpandSlice(0, 32, 20, 0, 0, 2.0),
        ExpandSlice(32, 8, 3, 640, 20, 0.5),
        ExpandSlice(40, 8, 5, 664, 23, -1.0),
    ]


def test_entries() -> None:
    """Rows of A go in blocks of 32 where a slot holds up to 28 ranks; the scaling is stored by its bits."""
    tables = SliceTables.allocate(num_slots=2, usual_rank=20, h_size=28, device=CPU)
    tables.write(1, SLICES)
    assert tables.shrink.block_rank == 32 and tables.expand.block_rank == 32
    assert tables.shrink.entries_SEF[1, :3, :5].tolist() == [[2, 0, 704, 0, 0], [0, 64, 23, 0, 0], [8, 40, 5, 1472, 23]]
    assert tables.expand.entries_SEF[1, :4, :5].tolist() == [
        [3, 0, 0, 0, 0], [0, 32, 20, 0, 0], [32, 8, 3, 640, 20], [40, 8, 5, 664, 23]
    ]  # fmt: skip
    assert tables.expand.entries_SEF[1, 1:4, 5].view(torch.float32).tolist() == [2.0, 0.5, -1.0]
    assert not tables.shrink.entries_SEF[0].any()
    tables.write(1, ())
    assert tables.shrink.entries_SEF[1, 0, 0] == tables.expand.entries_SEF[1, 0, 0] == 0


def test_gathered_entries() -> None:
    """B takes the columns of four ranks, each of which has shrunk 2 and 1: 8 of one slice and 4 of the other."""
    slices = [Slice(0, 64, 0, 32, 2, 0, 0, 2.0), Slice(0, 64, 32, 8, 1, 128, 256, 0.5)]
    assert expand_slices(slices, gathered=4) == [ExpandSlice(0, 32, 8, 0, 0, 2.0), ExpandSlice(32, 8, 4, 256, 2, 0.5)]
    tables = SliceTables.allocate(num_slots=1, usual_rank=2, h_size=3, device=CPU, gathered=4)
    tables.write(0, slices)
    assert tables.h_size == 3 and tables.expand.width == 8 and tables.expand.gathered == 4
    assert tables.shrink.entries_SEF[0, 0, :3].tolist() == [1, 0, 256 + 8 * 4], "what is prefetched: both B"


def test_tall_a_goes_in_blocks() -> None:
    assert ShrinkGroup(8, 10, 40, 100, 3).blocks(16) == [
        ShrinkGroup(8, 10, 16, 100, 3),
        ShrinkGroup(8, 10, 16, 260, 19),
        ShrinkGroup(8, 10, 8, 420, 35),
    ]


def test_ranks_are_the_only_limit() -> None:
    """28 ranks fit as one slice, or as 28 with windows of their own, whose blocks one program does."""
    tables = SliceTables.allocate(num_slots=1, usual_rank=28, h_size=28, device=CPU)
    assert tables.shrink.row_programs == 1
    windows = [Slice(8 * i, 8, 0, 16, 1, 8 * i, 16 * i, 1.0) for i in range(28)]
    tables.write(0, windows)
    assert tables.shrink.entries_SEF[0, 0, 0] == tables.expand.entries_SEF[0, 0, 0] == 28
    with pytest.raises(ValueError, match="found 29 ranks together, expected at most 28"):
        tables.write(0, [*windows, windows[0]])


def test_tiles() -> None:
    """Two slots and the base model, in tiles of up to 4 tokens."""
    table = SegmentTable(max_tokens=12, max_segments=2, block_tokens=4, device=CPU)
    assert table.max_tiles(12) == 4
    table.fill(slots=[5, -1, 2, 5], lengths=[3, 2, 1, 4])
    assert table.tiles_GF.tolist() == [[2, 0, 1, 1], [5, 1, 4, 1], [5, 5, 3, 0], [0, 0, 0, 0]]
    assert table.tokens_T[:8].tolist() == [5, 0, 1, 2, 6, 7, 8, 9]
    table.fill([-1], [9])
    assert not table.tiles_GF.any()


@pytest.mark.parametrize(("slots", "lengths"), [([0], [13]), ([0, 1, 2], [1, 1, 1])], ids=["tokens", "segments"])
def test_a_batch_that_does_not_fit_is_refused(slots: list[int], lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="expected at most 12 of 2"):
        SegmentTable(max_tokens=12, max_segments=2, block_tokens=4, device=CPU).fill(slots, lengths)


@pytest.mark.parametrize("tokens", range(1, 40))
def test_no_batch_has_more_tiles(tokens: int) -> None:
    """The worst batch leaves one token in each slot but one, behind full tiles."""
    table = SegmentTable(max_tokens=40, max_segments=3, block_tokens=4, device=CPU)
    worst = max(
        -(-a // 4) + -(-b // 4) + -(-(tokens - a - b) // 4) for a in range(tokens + 1) for b in range(tokens - a + 1)
    )
    assert worst <= table.max_tiles(tokens) <= worst + 1


def test_configuration_files_are_written_as_they_are_read() -> None:
    shape = Shape(64, 35, 1024, 8192, 16, 16, 1, 16)
    tuned = Configurations(90, "tuned by hand", {shape: replace(by_formula(shape, 90), splits=1)})
    assert parse_configurations(format_configurations(tuned)) == tuned


@pytest.mark.parametrize(
    ("shape", "capability", "splits", "overlap", "pdl"),
    [
        # Splits of at least 128 inputs, none of few, and about 512 programs; 264 where a block has 64 rows of A.
        (Shape(1, 1, 8192, 1280, 16, 32, 1, 16), 90, 16, True, False),
        (Shape(1, 1, 1024, 8192, 16, 16, 1, 16), 90, 1, True, False),
        (Shape(1, 1, 1024, 8192, 16, 32, 1, 32), 90, 8, True, False),
        (Shape(1, 1, 3584, 8192, 16, 16, 1, 16), 90, 16, True, False),
        (Shape(256, 47, 8192, 1280, 16, 32, 1, 16), 90, 8, True, False),
        (Shape(64, 16, 8192, 1280, 16, 64, 3, 32), 90, 4, True, False),
        (Shape(1, 1, 250, 8192, 16, 16, 1, 16), 90, 1, True, False),
        (Shape(2048, 71, 8192, 1280, 32, 32, 1, 16), 90, 4, False, True),
        (Shape(8192, 263, 8192, 1280, 32, 32, 1, 16), 100, 1, False, True),
        (Shape(8192, 263, 8192, 1280, 32, 32, 1, 16), 80, 1, False, False),
    ],
)
def test_formula(shape: Shape, capability: int, splits: int, overlap: bool, pdl: bool) -> None:
    found = by_formula(shape, capability)
    assert (found.splits, found.overlap, found.pdl) == (splits, overlap, pdl)


def test_overlap_without_pdl() -> None:
    with pytest.raises(ValueError, match="found overlap with pdl"):
        replace(by_formula(Shape(1, 1, 1024, 8192, 16, 16, 1, 16), 90), pdl=True)


def test_b_is_fetched_where_it_is_small_and_stays() -> None:
    """Beside a product of 17 MB, B of 8 adapters (2 MB) and not of 32, nor beside one of 59 MB: the cache has 50."""
    few, many = Shape(8, 8, 1024, 8192, 16, 16, 1, 16), Shape(256, 47, 1024, 8192, 16, 16, 1, 16)
    assert by_formula(few, 90).prefetch_b and not by_formula(many, 90).prefetch_b
    assert not by_formula(replace(few, inputs=3584), 90).prefetch_b
    with pytest.raises(ValueError, match="found prefetch_b without overlap"):
        replace(by_formula(few, 90), overlap=False)


def test_a_tuned_configuration_where_one_is_near() -> None:
    shape = Shape(64, 35, 1024, 8192, 16, 16, 1, 16)
    tuned = replace(by_formula(shape, 90), splits=1, block_o=64)
    known = Configurations(90, tuned={shape: tuned})
    assert known.choose(replace(shape, tokens=100, tiles=38)) == tuned
    for other in (replace(shape, tokens=128), replace(shape, expand_rank=32), replace(shape, block_tokens=32)):
        assert known.choose(other) == by_formula(other, 90)
    # Where a token must not feel its batch, what was tuned for some sizes of batches is of no use.
    assert replace(known, deterministic=True).choose(shape) == by_formula(shape, 90, deterministic=True)


@pytest.mark.parametrize("deterministic", [False, True], ids=["usual", "deterministic"])
@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
def test_scratch_has_room_for_every_batch(decode: bool, deterministic: bool) -> None:
    known = Configurations(90, deterministic=deterministic)
    block = known.block_tokens(decode)
    for inputs in (512, 1024, 3584, 8192, 28672):
        room = known.max_partial_tokens(16384, block)
        for tokens in (1, 2, 100, 256, 1000, 8000, 16384):
            for tiles in (-(-tokens // block), min(tokens, -(-tokens // block) + 31)):
                splits = known.choose(Shape(tokens, tiles, inputs, 8192, block, 16, 1, 16)).splits
                assert splits == 1 or splits * tokens <= room


def test_deterministic_configurations_do_not_know_the_batch() -> None:
    known = Configurations(90, deterministic=True)
    shapes = [Shape(tokens, tokens, 8192, 1280, 16, 32, 1, 16) for tokens in (1, 64, 256, 4096)]
    assert known.block_tokens(True) == known.block_tokens(False) == 16
    assert len({known.choose(shape) for shape in shapes}) == 1


def test_the_cpu_interprets_what_needs_no_newer_gpu() -> None:
    assert not device_configurations(CPU).choose(Shape(8192, 263, 8192, 1280, 32, 64, 1, 16)).pdl
