"""The eager kernels: what a CPU runs. Matrix products of PyTorch for many tokens of a slot, compiled loops for few.

`shrink` and `expand` are the two halves, between which fully sharded ranks exchange; `add_lora_delta` is both in a row.
Shape suffixes: S slots, T tokens, K tokens of one slot, I inputs, O outputs, R rank, N TP ranks whose shrink outputs B
takes, W columns of the shrink output.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch

from bdlora_kernels.layout import CPU_DTYPES, ENTRY, LayerFactors, PackedFactors, Slice
from bdlora_kernels.processor import has_products
from bdlora_kernels.segments import TokenBatch


@dataclass
class EagerFactors(LayerFactors):
    """Slots that hold B transposed, ``(N * R, O)``, so that its rows are read one after the other.

    On a CPU they are of the model's type where `cpu_kernels` reads that, else float32.

    Attributes:
        gathered: N of each slot.
        widths: columns of h that each slot needs.
        entries: `ENTRY` for each slice of each slot, for `cpu_kernels`.
        counts: how many each slot has.
        addresses: of all that, with its sizes, as `cpu_kernels` takes it.
    """

    gathered: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    entries: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros((0, 0), ENTRY))
    counts: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(0, np.int64))
    addresses: tuple[int, ...] = ()

    @classmethod
    def allocate(
        cls, num_slots: int, a_elements: int, b_elements: int, dtype: torch.dtype, device: torch.device
    ) -> "EagerFactors":
        """Empty slots of so many elements."""
        if device.type == "cpu" and dtype not in CPU_DTYPES:
            dtype = torch.float32
        # Zeros, so that the memory is really there: a server must not run out of it at its first request.
        a_SE, b_SE = (torch.zeros(num_slots, size, dtype=dtype, device=device) for size in (a_elements, b_elements))
        entries, counts = np.zeros((num_slots, 0), ENTRY), np.zeros(num_slots, np.int64)
        return cls(a_SE, b_SE, [()] * num_slots, [1] * num_slots, [0] * num_slots, entries, counts)

    def write(self, slot: int, packed: PackedFactors) -> None:
        self.a_SE[slot, : packed.a_E.numel()].copy_(packed.a_E, non_blocking=True)
        for part in packed.slices:
            shape = part.output_size, packed.gathered * part.rank
            place = slice(part.b_offset, part.b_offset + shape[0] * shape[1])
            self.b_SE[slot, place].view(shape[::-1]).copy_(packed.b_E[place].view(shape).T)
        self._describe(slot, packed.slices, packed.gathered)

    def clear(self, slot: int) -> None:
        self._describe(slot, (), 1)

    def _describe(self, slot: int, slices: Sequence[Slice], gathered: int) -> None:
        self.slices[slot], self.gathered[slot] = tuple(slices), gathered
        self.widths[slot], self.counts[slot] = sum(part.rank for part in slices), len(slices)
        if len(slices) > self.entries.shape[1]:
            more = np.zeros((len(self.slices), len(slices) - self.entries.shape[1]), ENTRY)
            self.entries = np.concatenate([self.entries, more], axis=1)
        column = 0
        for place, part in enumerate(slices):
            window = part.input_start, part.input_size, part.output_start, part.output_size, part.rank
            offsets = part.a_offset, part.b_offset, column, gathered
            self.entries[slot, place] = (*window, *offsets, part.scaling)
            column += part.rank
        tables = self.entries.ctypes.data, self.counts.ctypes.data, *self.entries.shape
        places = (number for factor in (self.a_SE, self.b_SE) for number in (factor.data_ptr(), factor.stride(0)))
        self.addresses = *tables, *places, self.a_SE.itemsize


def add_lora_delta(y_TO: torch.Tensor, x_TI: torch.Tensor, factors: EagerFactors, batch: TokenBatch) -> None:
    """``y[t, outputs] += scaling * (x[t, inputs] @ A.T) @ B.T`` in place, for each token t and each slice of its slot.

    Tokens without a slot are not touched.
    """
    width = shrink_width(factors, batch)
    if not width:
        return
    h_NTW = torch.empty(1, x_TI.shape[0], width, dtype=torch.float32, device=x_TI.device)
    if batch.many or not factors.a_SE.dtype == x_TI.dtype == y_TO.dtype:
        _shrink_into(h_NTW[0], x_TI, factors, batch)
        expand(y_TO, h_NTW, factors, batch)
    else:
        _run(factors, batch, h_NTW, x_TI, y_TO)


def shrink_width(factors: EagerFactors, batch: TokenBatch) -> int:
    """Columns that the shrink output of a batch needs: the largest sum of ranks of any slot in it."""
    return max(map(factors.widths.__getitem__, batch.slots), default=0)


def shrink(x_TI: torch.Tensor, factors: EagerFactors, batch: TokenBatch) -> torch.Tensor:
    """``h[t] = x[t, inputs] @ A.T``, zero where a token's slot has fewer rows or none: ``(T, shrink_width)``."""
    h_TW = torch.zeros(len(x_TI), shrink_width(factors, batch), dtype=torch.float32, device=x_TI.device)
    if h_TW.numel():
        _shrink_into(h_TW, x_TI, factors, batch)
    return h_TW.to(x_TI.dtype)


def _shrink_into(h_TW: torch.Tensor, x_TI: torch.Tensor, factors: EagerFactors, batch: TokenBatch) -> None:
    if len(batch.few):
        _run(factors, batch, h_TW[None], x_TI=x_TI.to(factors.a_SE.dtype))
    for segment in batch.many:
        dtype = _product_dtype(factors.a_SE)
        x_KI = x_TI[segment.tokens].to(dtype)
        for columns, inputs, a_RI in _shrinks(factors, segment.slot):
            h_TW[segment.tokens, columns] = (x_KI[:, inputs] @ a_RI.to(dtype).T).to(h_TW.dtype)


def expand(y_TO: torch.Tensor, h_NTW: torch.Tensor, factors: EagerFactors, batch: TokenBatch) -> None:
    """``y[t, outputs] += scaling * concat(h[0, t, rows], ..., h[N - 1, t, rows]) @ B.T`` in place, for each slice."""
    h_NTW = h_NTW.float()
    if len(batch.few):
        # In y itself, or in sums that are rounded once, where the factors have more bits.
        sums_TO = y_TO if y_TO.dtype == factors.b_SE.dtype else torch.zeros_like(y_TO, dtype=factors.b_SE.dtype)
        _run(factors, batch, h_NTW.contiguous(), y_TO=sums_TO)
        if sums_TO is not y_TO:
            y_TO += sums_TO
    for segment in batch.many:
        dtype = _product_dtype(factors.b_SE)
        h_KNW = h_NTW[:, segment.tokens].transpose(0, 1).to(dtype)
        in_place = isinstance(segment.tokens, slice) and y_TO.dtype == dtype
        y_KO = y_TO[segment.tokens].to(dtype)
        for columns, part, b_RO in _expands(factors, segment.slot):
            outputs = slice(part.output_start, part.output_start + part.output_size)
            y_KO[:, outputs].addmm_(h_KNW[:, :, columns].flatten(1), b_RO.to(dtype), alpha=part.scaling)
        if not in_place:
            y_TO[segment.tokens] = y_KO.to(y_TO.dtype)


def _product_dtype(factor: torch.Tensor) -> torch.dtype:
    """In what its products are computed."""
    return factor.dtype if factor.device.type != "cpu" or has_products(factor.dtype) else torch.float32


def _shrinks(factors: EagerFactors, slot: int) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Columns of h, inputs and A: one product for neighbouring slices that read the same inputs."""
    column = 0
    for (start, size), group in groupby(factors.slices[slot], key=lambda part: (part.input_start, part.input_size)):
        parts = list(group)
        rank = sum(part.rank for part in parts)
        a_E = factors.a_SE[slot, parts[0].a_offset : parts[0].a_offset + rank * size]
        yield slice(column, column + rank), slice(start, start + size), a_E.view(rank, size)
        column += rank


def _expands(factors: EagerFactors, slot: int) -> Iterator[tuple[slice, Slice, torch.Tensor]]:
    """Columns of each rank's h, the slice, and its B."""
    column = 0
    for part in factors.slices[slot]:
        rows = factors.gathered[slot] * part.rank
        b_E = factors.b_SE[slot, part.b_offset : part.b_offset + rows * part.output_size]
        yield slice(column, column + part.rank), part, b_E.view(rows, part.output_size)
        column += part.rank


def _run(
    factors: EagerFactors,
    batch: TokenBatch,
    h_NTW: torch.Tensor,
    x_TI: torch.Tensor | None = None,
    y_TO: torch.Tensor | None = None,
) -> None:
    """Compiled loops over the segments of few tokens: shrink where x is given, expand where y is.

    Both are of the factors' type, y row-major.
    """
    from bdlora_kernels.cpu_kernels import delta_loop, expand_loop, shrink_loop  # with Numba: not for a GPU

    if x_TI is not None and x_TI.stride(1) != 1:
        x_TI = x_TI.contiguous()
    assert y_TO is None or y_TO.stride(1) == 1 or y_TO.shape[1] == 1, y_TO.stride()
    loop = shrink_loop if y_TO is None else expand_loop if x_TI is None else delta_loop
    loop(
        *batch.few_at,
        *factors.addresses,
        *(h_NTW.data_ptr(), *h_NTW.shape),
        *((0, 0) if x_TI is None else (x_TI.data_ptr(), x_TI.stride(0))),
        *((0, 0, 0) if y_TO is None else (y_TO.data_ptr(), y_TO.stride(0), y_TO.shape[1])),
    )
