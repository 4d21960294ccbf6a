"""Tokens of a batch, grouped by the slot of their adapter."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Segment:
    """The tokens that share an adapter: ``tokens`` is an int64 index of shape (T_segment,), or a slice when they are
    neighbours, which spares the gather."""

    slot: int
    tokens: torch.Tensor | slice
    num_tokens: int


def group_tokens(slots: Sequence[int], lengths: Sequence[int], device: torch.device) -> list[Segment]:
    """Group the tokens of a batch by slot.

    Args:
        slots: the slot of each request; negative for the base model, whose tokens fall into no segment.
        lengths: the number of tokens of each request, in the order in which they lie in the batch.
        device: where the token indices go.
    """
    spans: dict[int, list[range]] = {}
    start = 0
    for slot, length in zip(slots, lengths, strict=True):
        if slot >= 0 and length > 0:
            runs = spans.setdefault(slot, [])
            if runs and runs[-1].stop == start:
                runs[-1] = range(runs[-1].start, start + length)
            else:
                runs.append(range(start, start + length))
        start += length
    return [_segment(slot, spans[slot], device) for slot in sorted(spans)]


def _segment(slot: int, runs: list[range], device: torch.device) -> Segment:
    if len(runs) == 1:
        return Segment(slot, slice(runs[0].start, runs[0].stop), len(runs[0]))
    index = torch.tensor([token for run in runs for token in run], dtype=torch.int64)
    return Segment(slot, index.to(device, non_blocking=True), len(index))
