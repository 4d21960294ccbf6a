"""How an adapter is spread over the ranks: what a slot holds of it and how its delta is computed."""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from sglang.srt.layers.linear import ColumnParallelLinear, RowParallelLinear

from bdlora_kernels import LayerFactors, PackedFactors
from bdlora_sglang.adapter import Adapter, LoRAModule
from bdlora_sglang.serving.layers import ServedModule

if TYPE_CHECKING:
    from bdlora_sglang.serving.kernels import Kernels


@dataclass(frozen=True)
class SlotSize:
    """What one slot of one layer has room for.

    Attributes:
        a, b: elements of the A and the B factors.
        ranks: ranks of all slices together, however many there are.
        usual_rank: rank of one slice; no limit, the kernels are chosen by it.
    """

    a: int = 0
    b: int = 0
    ranks: int = 0
    usual_rank: int = 0

    @classmethod
    def of(cls, packed: PackedFactors) -> "SlotSize":
        """Just large enough for ``packed``."""
        ranks = [part.rank for part in packed.slices]
        return cls(packed.a_E.numel(), packed.b_E.numel(), sum(ranks), max(ranks))

    def max(self, other: "SlotSize") -> "SlotSize":
        """Large enough for whatever fits either."""
        return SlotSize(*map(max, astuple(self), astuple(other)))

    def fits(self, other: "SlotSize") -> bool:
        """Whether what needs ``other`` fits here."""
        return other.a <= self.a and other.b <= self.b and other.ranks <= self.ranks


@dataclass(frozen=True)
class LocalFactors:
    """One adapter's part of one layer on this rank. ``rank`` is the largest of its modules on this GPU."""

    packed: PackedFactors
    rank: int


class Sharding(Protocol):
    """One way to shard LoRA over the ranks of a layer.

    ``description`` ends the line that a server prints at its start. ``exchanges`` says whether ranks wait for one
    another between shrink and expand.
    """

    description: str
    exchanges: bool

    def flag_that_fits(self, rank: int, local_rank: int) -> str:
        """The flag of a server whose slots hold an adapter of this ``rank``, ``local_rank`` of it on one GPU."""

    def read(
        self, adapter: Adapter, modules: Sequence[tuple[LoRAModule, ServedModule]], dtype: torch.dtype
    ) -> LocalFactors | None:
        """This rank's factors of the modules of one layer, in output order; None when it holds none of them.

        Raises:
            AdapterError: NaN, infinity, or a value too large for ``dtype``.
        """

    def slot_size(self, layer: ColumnParallelLinear | RowParallelLinear, rank: int) -> SlotSize:
        """A slot that fits any adapter of at most ``rank``: the local rank, or the whole one (`flag_that_fits`)."""

    def forward_with_base(
        self,
        layer: ColumnParallelLinear | RowParallelLinear,
        base: Callable[[], torch.Tensor],
        x_TI: torch.Tensor,
        factors: LayerFactors,
        kernels: "Kernels",
        segments: Any,
    ) -> torch.Tensor:
        """``base()``, the layer's output on this rank before its own all-reduce, with LoRA's part added.

        ``segments`` are those that ``kernels`` made of the batch.
        """
