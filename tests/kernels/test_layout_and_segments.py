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


def indices(segment: Segment, num_tokens: int) -> list[int]:
    return [token for span in segment.spans for token in range(num_tokens)[span.start : span.stop]]


@pytest.mark.parametrize("seed", range(20))
def test_each_token_is_in_the_segment_of_its_slot(seed: int) -> None:
    source = random.Random(seed)
    slots = [source.randint(-1, 3) for _ in range(source.randint(0, 12))]
    lengths = [source.randint(0, 4) for _ in slots]
    slot_of_token = [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)]
    segments = group_tokens(slots, lengths, CPU).segments
    assert [segment.slot for segment in segments] == sorted({slot for slot in slot_of_token if slot >= 0})
    for segment in segments:
        tokens = indices(segment, len(slot_of_token))
        assert tokens == [token for token, slot in enumerate(slot_of_token) if slot == segment.slot]
        assert segment.num_tokens == len(tokens)


def test_neighbours_need_no_gather() -> None:
    """Also across requests, and across an empty one between them."""
    batch = group_tokens([-1, 2, 2, 0, 2], [3, 4, 1, 0, 2], CPU)
    assert batch.segments == (Segment(2, (range(3, 10),)),)
    values = torch.arange(20.0).view(10, 2)
    taken = batch.tokens(2, 1).take(values, torch.float32)
    assert taken.data_ptr() == values[3:].data_ptr() and torch.equal(taken, values[None, 3:])
    taken += 1
    batch.tokens(2, 1).put(values, taken)
    assert torch.equal(values[3:], torch.arange(7.0, 21).view(7, 2))
    # And across slots, where each has as many tokens as the other.
    neighbours = group_tokens([0, 1, 2], [2, 2, 2], CPU).tokens(0, 3)
    assert neighbours.take(values, torch.float32).data_ptr() == values.data_ptr()


@pytest.mark.parametrize("seed", range(20))
def test_tokens_are_taken_and_put_back(seed: int) -> None:
    """Whatever the order: each slot's tokens, padded to as many as the longest has, and only theirs are written."""
    source = random.Random(seed)
    slots = [source.randint(-1, 5) for _ in range(12)]
    lengths = [source.randint(0, 3) for _ in slots]
    of_token = [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)]
    if not any(1 <= slot <= 4 for slot in of_token):
        return
    tokens = group_tokens(slots, lengths, CPU).tokens(1, 4)
    values = torch.arange(float(len(of_token) * 3)).view(-1, 3)
    taken = tokens.take(values, torch.float64)
    for place, slot in enumerate(range(1, 5)):
        own = [token for token, other in enumerate(of_token) if other == slot]
        assert torch.equal(taken[place, : len(own)], values[own].double())
    tokens.put(values, -taken)
    for token, slot in enumerate(of_token):
        sign = -1 if 1 <= slot <= 4 else 1
        assert torch.equal(values[token], sign * torch.arange(3.0 * token, 3 * token + 3))


def test_lengths_must_match() -> None:
    with pytest.raises(ValueError, match="zip"):
        group_tokens([0, 1], [1], CPU)
