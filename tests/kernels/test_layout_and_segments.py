"""Where factors stand in a slot, and how the tokens of a batch are grouped."""

import random
from itertools import pairwise

import pytest
import torch

from bdlora_kernels import LayerFactors, Segment, UnpackedSlice, group_tokens, pack
from bdlora_kernels.layout import ALIGNMENT, align

CPU = torch.device("cpu")


def part(rank: int, inputs: range, outputs: range) -> UnpackedSlice:
    a, b = torch.randn(rank, len(inputs)), torch.randn(len(outputs), rank)
    return UnpackedSlice(a, b, inputs.start, outputs.start, scaling=rank / 2)


def test_packed_factors_are_found_again() -> None:
    parts = [
        part(3, range(13), range(5)),
        part(2, range(13), range(5, 7)),
        part(1, range(13, 20), range(7)),
        part(4, range(13), range(7)),
    ]
    packed = pack(parts)
    factors = LayerFactors(packed.a_E[None], packed.b_E[None], [packed.slices])
    for place, given in zip(packed.slices, parts, strict=True):
        assert torch.equal(factors.a(0, place), given.a) and torch.equal(factors.b(0, place), given.b)
        assert (place.input_start, place.output_start) == (given.input_start, given.output_start)
        assert place.scaling == given.scaling
    assert packed.num_bytes == 4 * (packed.a_E.numel() + packed.b_E.numel())


def test_neighbours_with_the_same_inputs_share_one_a_matrix() -> None:
    q, k, v = part(3, range(13), range(5)), part(2, range(13), range(5, 7)), part(4, range(13), range(7, 9))
    packed = pack([q, k, v])
    a = packed.a_E[: 9 * 13].view(9, 13)
    assert torch.equal(a, torch.cat([q.a, k.a, v.a]))


def test_factors_start_aligned_and_do_not_overlap() -> None:
    packed = pack([part(3, range(start, start + 5), range(7)) for start in (0, 5, 10, 15)])
    for offsets, size in (("a_offset", 15), ("b_offset", 21)):
        starts = [getattr(place, offsets) for place in packed.slices]
        assert all(start % ALIGNMENT == 0 for start in starts)
        assert all(second - first >= size for first, second in pairwise(starts))


@pytest.mark.parametrize(("elements", "aligned"), [(0, 0), (1, 16), (15, 16), (16, 16), (17, 32)])
def test_align(elements: int, aligned: int) -> None:
    assert align(elements) == aligned


@pytest.mark.parametrize("few_tokens", [0, 3, 100])
@pytest.mark.parametrize("seed", range(20))
def test_each_token_is_in_the_segment_of_its_slot(seed: int, few_tokens: int) -> None:
    source = random.Random(seed)
    slots = [source.randint(-1, 3) for _ in range(source.randint(0, 12))]
    lengths = [source.randint(0, 4) for _ in slots]
    slot_of_token = [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)]
    expected = {
        slot: [token for token, other in enumerate(slot_of_token) if other == slot]
        for slot in set(slot_of_token) - {-1}
    }
    batch = group_tokens(slots, lengths, CPU, few_tokens)
    assert batch.slots == tuple(sorted(expected))
    few = {slot: batch.places[start:stop].tolist() for slot, start, stop in batch.few.tolist()}
    assert few == {slot: tokens for slot, tokens in expected.items() if len(tokens) <= few_tokens}
    every_token = torch.arange(len(slot_of_token))
    many = {segment.slot: every_token[segment.tokens].tolist() for segment in batch.many}
    assert few | many == expected


def test_neighbours_need_no_gather() -> None:
    """Also across requests, and across an empty one between them."""
    (segment,) = group_tokens([-1, 2, 2, 0, 2], [3, 4, 1, 0, 2], CPU, few_tokens=0).many
    assert segment == Segment(2, slice(3, 10))


def test_lengths_must_match() -> None:
    with pytest.raises(ValueError, match="found 2 slots and 1 lengths"):
        group_tokens([0, 1], [1], CPU)
