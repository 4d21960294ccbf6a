"""How much room one slot of one layer has."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Protocol

from bdlora_kernels.layout import Slice


class Measured(Protocol):
    """A layer's factors, packed or just planned."""

    @property
    def slices(self) -> Sequence[Slice]: ...

    @property
    def a_elements(self) -> int: ...

    @property
    def b_elements(self) -> int: ...

    @property
    def gathered(self) -> int: ...


@dataclass(frozen=True)
class SlotSize:
    """What one slot of one layer has room for.

    Attributes:
        a, b: elements of the A and the B factors.
        ranks: ranks of all slices together, however many there are.
        usual_rank, usual_ranks: rank of one slice, and of all together, of most adapters. No limits: the kernels are
            chosen by them.
        gathered: TP ranks whose shrink outputs B takes (`plan_layer`): the same for every adapter.
    """

    a: int = 0
    b: int = 0
    ranks: int = 0
    usual_rank: int = 0
    usual_ranks: int = 0
    gathered: int = 1

    @classmethod
    def of(cls, factors: Measured) -> "SlotSize":
        """Just large enough for ``factors``."""
        ranks = [part.rank for part in factors.slices]
        return cls(factors.a_elements, factors.b_elements, sum(ranks), max(ranks), sum(ranks), factors.gathered)

    def __bool__(self) -> bool:
        """Whether there is room for anything at all."""
        return self.ranks > 0

    @classmethod
    def largest(cls, sizes: Iterable["SlotSize"]) -> "SlotSize":
        """Large enough for whatever fits any of them."""
        return functools.reduce(cls.max, sizes, cls())

    def max(self, other: "SlotSize") -> "SlotSize":
        """Large enough for whatever fits either."""
        return SlotSize(*map(max, astuple(self), astuple(other)))

    def made_for(self, usual: "SlotSize") -> "SlotSize":
        """As large, with kernels for what just fits into ``usual``; that may be nothing."""
        return replace(self, usual_rank=usual.usual_rank, usual_ranks=usual.usual_ranks) if usual else self

    def fits(self, other: "SlotSize") -> bool:
        """Whether what needs ``other`` fits here."""
        return other.a <= self.a and other.b <= self.b and other.ranks <= self.ranks
