"""Tokens of a batch, grouped by the slot of their adapter."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

# A slot with more tokens than these gets products of its own; padding the others to as many would cost more.
FEW_TOKENS = 8


@dataclass(frozen=True)
class Segment:
    """The tokens that share an adapter; ``spans`` are ranges of neighbours in the batch, in order."""

    slot: int
    spans: tuple[range, ...]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.spans))


@dataclass(frozen=True)
class Tokens:
    """Where the tokens of S neighbouring slots are, K of each, the slots with fewer padded.

    Attributes:
        source: the token of each place of ``(S, K)``, flat; a slice where they are neighbours.
        filled: the places that are no padding; None where there is none.
        target: the tokens of those places.
    """

    num_slots: int
    source: slice | torch.Tensor
    filled: torch.Tensor | None
    target: slice | torch.Tensor

    def take(self, values_T: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``(S, K, ...)`` of ``(T, ...)``: a view where the tokens are neighbours and the type is the same."""
        taken = values_T[self.source] if isinstance(self.source, slice) else values_T.index_select(0, self.source)
        return taken.to(dtype).view(self.num_slots, -1, *values_T.shape[1:])

    def put(self, values_T: torch.Tensor, taken: torch.Tensor) -> None:
        """The way back: write ``(S, K, ...)`` to the tokens' places, unless it is the view that `take` gave."""
        flat = taken.flatten(0, 1)
        if self.filled is not None:
            flat = flat.index_select(0, self.filled)
        if isinstance(self.target, torch.Tensor):
            values_T.index_copy_(0, self.target, flat.to(values_T.dtype))
        elif values_T.dtype != flat.dtype or values_T[self.target].data_ptr() != flat.data_ptr():
            values_T[self.target] = flat


@dataclass
class TokenBatch:
    """A batch's segments by slot, and their `Tokens` by run of slots, which all layers share."""

    segments: tuple[Segment, ...]
    device: torch.device
    key: tuple[tuple[int, bool], ...] = ()
    _tokens: dict[tuple[int, int], Tokens] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.key = tuple((segment.slot, segment.num_tokens > FEW_TOKENS) for segment in self.segments)

    def tokens(self, first: int, count: int) -> Tokens:
        """Those of the slots ``first`` to ``first + count - 1``."""
        if (first, count) not in self._tokens:
            self._tokens[first, count] = self._find(first, count)
        return self._tokens[first, count]

    def _find(self, first: int, count: int) -> Tokens:
        own = {segment.slot: segment for segment in self.segments if first <= segment.slot < first + count}
        spans = [span for slot in sorted(own) for span in own[slot].spans]
        width = max(segment.num_tokens for segment in own.values())
        is_full = len(own) == count and all(segment.num_tokens == width for segment in own.values())
        if is_full and all(left.stop == right.start for left, right in pairwise(spans)):
            place = slice(spans[0].start, spans[-1].stop)
            return Tokens(count, place, None, place)
        source: list[int] = []
        filled: list[int] = []
        for slot in range(first, first + count):
            tokens = [token for span in own[slot].spans for token in span] if slot in own else []
            filled += range(len(source), len(source) + len(tokens))
            source += tokens + [spans[0].start] * (width - len(tokens))
        all_of_them = self._index(source)
        if is_full:
            return Tokens(count, all_of_them, None, all_of_them)
        return Tokens(count, all_of_them, self._index(filled), self._index([source[place] for place in filled]))

    def _index(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64).to(self.device, non_blocking=True)


def group_tokens(slots: Sequence[int], lengths: Sequence[int], device: torch.device) -> TokenBatch:
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
    return TokenBatch(tuple(Segment(slot, tuple(spans[slot])) for slot in sorted(spans)), device)
