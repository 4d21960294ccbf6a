"""Tokens of a batch, grouped by the slot of their adapter."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

# A slot with more tokens than these gets matrix products of its own: faster, though its tokens must lie side by side.
FEW_TOKENS = 8


@dataclass(frozen=True)
class Segment:
    """The tokens that share an adapter, in order: a slice where they are neighbours, else an index on the device."""

    slot: int
    tokens: slice | torch.Tensor


@dataclass(frozen=True)
class TokenBatch:
    """The tokens of a batch that have a slot.

    Attributes:
        slots: those in use, sorted.
        few: rows ``(slot, start, stop)`` for the slots with few tokens, which are ``places[start:stop]``; int64.
        places: tokens, int64.
        many: the segments of the other slots.
    """

    slots: tuple[int, ...]
    few: np.ndarray[Any, np.dtype[np.int64]]
    places: np.ndarray[Any, np.dtype[np.int64]]
    many: tuple[Segment, ...]

    @cached_property
    def few_at(self) -> tuple[int, ...]:
        """Addresses and lengths of ``few`` and ``places``, for `cpu_kernels`."""
        return self.few.ctypes.data, len(self.few), self.places.ctypes.data, len(self.places)


def group_tokens(
    slots: Sequence[int], lengths: Sequence[int], device: torch.device, few_tokens: int = FEW_TOKENS
) -> TokenBatch:
    """Group the tokens of a batch by slot.

    Args:
        slots: the slot of each request; negative for the base model, whose tokens fall into no segment.
        lengths: the number of tokens of each request, in the order in which they lie in the batch.
        device: where the indices of `Segment` go.
        few_tokens: a slot with more gets a `Segment`.
    """
    if len(slots) != len(lengths):
        raise ValueError(f"found {len(slots)} slots and {len(lengths)} lengths, expected one of each for every request")
    slot_T = np.repeat(np.array(slots, np.int64), np.array(lengths, np.int64))
    places = slot_T.argsort(kind="stable")[int((slot_T < 0).sum()) :]
    used, starts, counts = np.unique(slot_T[places], return_index=True, return_counts=True)
    rows = np.stack([used, starts, starts + counts], axis=1)
    is_few = counts <= few_tokens
    many = tuple(Segment(int(slot), _index(places[start:stop], device)) for slot, start, stop in rows[~is_few])
    return TokenBatch(tuple(used.tolist()), np.ascontiguousarray(rows[is_few]), places, many)


def _index(tokens: np.ndarray[Any, np.dtype[np.int64]], device: torch.device) -> slice | torch.Tensor:
    if tokens[-1] - tokens[0] == len(tokens) - 1:
        return slice(int(tokens[0]), int(tokens[-1]) + 1)
    return torch.from_numpy(tokens).to(device, non_blocking=True)
