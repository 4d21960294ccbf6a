"""The tables that the kernels read, and the configurations that they are launched with; figures worked out by hand."""

from dataclasses import replace

import pytest
import torch

from bdlora_kernels import Slice
from bdlora_kernels.configurations import (
    Shape,
    choose_configuration,
    format_configurations,
    known_architectures,
    load_configurations,
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
        ExpandSlice(0, 32, 20, 20, 0, 0, 2.0),
        ExpandSlice(32, 8, 3, 3, 640, 20, 0.5),
        ExpandSlice(40, 8, 5, 5, 664, 23, -1.0),
    ]


def test_entries() -> None:
    """Rows of A go in blocks of 32 where a slot holds up to 28 ranks; the scaling is stored by its bits."""
    tables = SliceTables.allocate(num_slots=2, usual_rank=20, h_size=28, device=CPU)
    tables.write(1, SLICES)
    assert tables.shrink.block_rank == 32 and tables.expand.block_rank == 32
    assert tables.shrink.entries_SEF[1, :3, :5].tolist() == [[2, 0, 0, 0, 0], [0, 64, 23, 0, 0], [8, 40, 5, 1472, 23]]
    assert tables.expand.entries_SEF[1, :4, :6].tolist() == [
        [3, 0, 0, 0, 0, 0], [0, 32, 20, 20, 0, 0], [32, 8, 3, 3, 640, 20], [40, 8, 5, 5, 664, 23]
    ]  # fmt: skip
    assert tables.expand.entries_SEF[1, 1:4, 6].view(torch.float32).tolist() == [2.0, 0.5, -1.0]
    assert not tables.shrink.entries_SEF[0].any()
    tables.write(1, ())
    assert tables.shrink.entries_SEF[1, 0, 0] == tables.expand.entries_SEF[1, 0, 0] == 0


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
    assert table.tiles_GF.tolist() == [[2, 0, 1, 0], [5, 1, 4, 0], [5, 5, 3, 0], [0, 0, 0, 0]]
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
    assert known_architectures() == (80, 90, 100)
    for capability in known_architectures():
        configurations = load_configurations(capability)
        assert parse_configurations(format_configurations(configurations)) == configurations
        blocks = {shape.blocks for shape in configurations.by_shape}
        assert blocks == {(tokens, rank) for tokens in (16, 64) for rank in (16, 32, 64)}
        assert [configurations.block_tokens(tokens) for tokens in (1, 256, 257)] == [16, 16, 64]


@pytest.mark.parametrize(("capability", "found"), [(75, 80), (80, 80), (89, 80), (90, 90), (103, 100), (120, 100)])
def test_a_gpu_takes_the_newest_configurations_that_are_no_newer(capability: int, found: int) -> None:
    assert load_configurations(capability).architecture == f"sm_{found}"


@pytest.mark.parametrize("other", ["fused", "pdl"])
def test_overlap_alone(other: str) -> None:
    (first, *_) = load_configurations(90).by_shape.values()
    overlapping = first.overlapping()
    assert overlapping.overlap and not overlapping.fused and not overlapping.pdl
    with pytest.raises(ValueError, match=f"found overlap with .*{other}=True"):
        replace(overlapping, **{other: True})


def test_nearest_configuration() -> None:
    known = load_configurations(90)
    (first, *_) = known.by_shape.values()
    marked = {
        Shape(16, 1024, 8192, 16, 16): replace(first, splits=1),
        Shape(16, 8192, 1280, 16, 16): replace(first, splits=2),
        Shape(256, 1024, 8192, 16, 16): replace(first, splits=3),
        Shape(16, 1024, 8192, 16, 32): replace(first, splits=4),
        Shape(1024, 1024, 8192, 64, 16): replace(first, splits=5),
    }
    configurations = replace(known, by_shape=marked)
    asked = {
        Shape(16, 8192, 1280, 16, 16): 2,
        Shape(1, 4096, 6144, 16, 16): 1,  # 2 + 0.4 doublings from the first, 1 + 2.3 from the second
        Shape(65, 1024, 8192, 16, 16): 3,
        Shape(16, 8192, 1280, 16, 32): 4,
        Shape(16, 1024, 8192, 64, 16): 5,  # tiles of a prefill, though the batch is small
    }
    assert {shape: configurations.nearest(shape).splits for shape in asked} == asked


def test_the_cpu_interprets_what_needs_no_newer_gpu() -> None:
    assert not choose_configuration(CPU, Shape(8192, 8192, 1280, 64, 64)).pdl
