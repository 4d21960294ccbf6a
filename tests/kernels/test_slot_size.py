"""What a slot of the memory pool is the measure of."""

import pytest
import torch

from bdlora_kernels import PackedFactors, SlotSize, UnpackedSlice, pack

INPUTS, OUTPUTS = 64, 48


def blocks(count: int, rank: int) -> PackedFactors:
    """A row-parallel adapter of ``rank`` together, whose blocks each read a window of the inputs."""
    window, own = INPUTS // count, rank // count
    a, b = torch.ones(own, window), torch.ones(OUTPUTS, own)
    return pack([UnpackedSlice(a, b, i * window, 0, 1.0) for i in range(count)])


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_a_slot_fits_any_number_of_blocks(count: int) -> None:
    slot = SlotSize.of(blocks(1, 8))
    assert slot.fits(SlotSize.of(blocks(count, 8)))
    assert not slot.fits(SlotSize.of(blocks(count, 16)))
