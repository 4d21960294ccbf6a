"""The PyTorch kernels: what a CPU runs. One product serves all neighbouring slots that are laid out alike.

`shrink` and `expand` are the two halves, between which fully sharded ranks exchange; `add_lora_delta` is both in a row.
Shape suffixes: S slots of a run, K tokens of the slot that has most, T tokens, I inputs, O outputs, R rank, N ranks
whose shrink outputs B takes, W columns of the shrink output.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch

from bdlora_kernels.layout import LayerFactors, PackedFactors, Slice
from bdlora_kernels.segments import TokenBatch, Tokens

# Plans of so many batches are kept a layer: the slots in use change far more seldom than the batch.
_MOST_PLANS = 32


@dataclass(frozen=True)
class Expand:
    """A product with B: ``y[:, :, outputs] += scaling * (h[:, :, columns] @ b_SRO)``.

    ``scaling`` is a number where the slots agree, else ``(S, 1, 1)``.
    """

    columns: slice
    outputs: slice
    b_SRO: torch.Tensor
    scaling: float | torch.Tensor


@dataclass(frozen=True)
class Run:
    """Neighbouring slots of one layout; ``shrinks`` are products with A: inputs, and ``a_SIR``."""

    first: int
    count: int
    width: int
    shrinks: tuple[tuple[slice, torch.Tensor], ...]
    expands: tuple[Expand, ...]


@dataclass
class BatchedFactors(LayerFactors):
    """Slots that hold B transposed, ``(R, O)``: so its rows are read one after the other (twice as fast as ``(O, R)``).

    On a CPU they are float32 whatever the model's type: PyTorch's batched products are five times slower in 16 bits.
    """

    gathered: list[int] = field(default_factory=list)
    _plans: dict[tuple[tuple[int, bool], ...], list[Run]] = field(default_factory=dict)

    @classmethod
    def allocate(
        cls, num_slots: int, a_elements: int, b_elements: int, dtype: torch.dtype, device: torch.device
    ) -> "BatchedFactors":
        """Empty slots of so many elements."""
        dtype = torch.float32 if device.type == "cpu" else dtype
        # Zeros, so that the memory is really there: a server must not run out of it at its first request.
        a_SE, b_SE = (torch.zeros(num_slots, size, dtype=dtype, device=device) for size in (a_elements, b_elements))
        return cls(a_SE, b_SE, [()] * num_slots, [1] * num_slots)

    def write(self, slot: int, packed: PackedFactors) -> None:
        self.a_SE[slot, : packed.a_E.numel()].copy_(packed.a_E, non_blocking=True)
        for part in packed.slices:
            shape = part.output_size, packed.gathered * part.rank
            place = slice(part.b_offset, part.b_offset + shape[0] * shape[1])
            self.b_SE[slot, place].view(shape[::-1]).copy_(packed.b_E[place].view(shape).T)
        self.slices[slot], self.gathered[slot] = packed.slices, packed.gathered
        self._plans.clear()

    def clear(self, slot: int) -> None:
        super().clear(slot)
        self._plans.clear()

    def runs(self, batch: TokenBatch) -> list[Run]:
        """The batch's slots that hold something here."""
        if batch.key not in self._plans:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            self._plans[batch.key] = [self._run(slots) for slots in self._neighbours(batch.key)]
        return self._plans[batch.key]

    def _neighbours(self, key: Sequence[tuple[int, bool]]) -> Iterator[list[int]]:
        """Slots for one product: laid out alike, with at most one slot between two that the batch does not use.

        A slot with many tokens goes alone.
        """
        run: list[int] = []
        for slot, has_many in key:
            joins = not has_many and run and slot - run[-1] <= 2 and self._layout(slot) == self._layout(run[-1])
            if run and not joins:
                yield run
                run = []
            if self.slices[slot]:
                run.append(slot)
            if run and has_many:
                yield run
                run = []
        if run:
            yield run

    def _layout(self, slot: int) -> object:
        return self.gathered[slot], [
            (p.input_start, p.input_size, p.output_start, p.output_size, p.rank, p.a_offset, p.b_offset)
            for p in self.slices[slot]
        ]

    def _run(self, slots: Sequence[int]) -> Run:
        first, count = slots[0], slots[-1] - slots[0] + 1
        shrinks: list[tuple[slice, torch.Tensor]] = []
        expands: list[Expand] = []
        column = 0
        for group in _same_inputs(self.slices[first]):
            head, rank = group[0][1], sum(part.rank for _, part in group)
            a_SRI = self._matrices(self.a_SE, first, count, head.a_offset, rank, head.input_size)
            shrinks.append((slice(head.input_start, head.input_start + head.input_size), a_SRI.transpose(1, 2)))
            for index, part in group:
                rows = self.gathered[first] * part.rank
                expands.append(
                    Expand(
                        slice(column, column + part.rank),
                        slice(part.output_start, part.output_start + part.output_size),
                        self._matrices(self.b_SE, first, count, part.b_offset, rows, part.output_size),
                        self._scaling(slots, index),
                    )
                )
                column += part.rank
        return Run(first, count, column, tuple(shrinks), tuple(expands))

    @staticmethod
    def _matrices(flat_SE: torch.Tensor, first: int, count: int, offset: int, rows: int, columns: int) -> torch.Tensor:
        window = flat_SE[first : first + count, offset : offset + rows * columns]
        return window.view(count, rows, columns)

    def _scaling(self, slots: Sequence[int], index: int) -> float | torch.Tensor:
        scalings = {slot: self.slices[slot][index].scaling for slot in slots}
        if len(set(scalings.values())) == 1:
            return scalings[slots[0]]
        every = [scalings.get(slot, 0.0) for slot in range(slots[0], slots[-1] + 1)]
        return torch.tensor(every, dtype=self.a_SE.dtype, device=self.a_SE.device)[:, None, None]


def _same_inputs(slices: Sequence[Slice]) -> Iterator[list[tuple[int, Slice]]]:
    """Runs of slices, with their places, that read the same inputs, and whose A factors are one matrix."""
    for _, group in groupby(enumerate(slices), key=lambda item: (item[1].input_start, item[1].input_size)):
        yield list(group)


def add_lora_delta(y_TO: torch.Tensor, x_TI: torch.Tensor, factors: BatchedFactors, batch: TokenBatch) -> None:
    """``y[t, outputs] += scaling * (x[t, inputs] @ A.T) @ B.T`` in place, for each token t and each slice of its slot.

    Tokens without a slot are not touched.
    """
    for run in factors.runs(batch):
        tokens = batch.tokens(run.first, run.count)
        _expand_run(y_TO, _shrink_run(x_TI, run, tokens), run, tokens)


def shrink_width(factors: LayerFactors, batch: TokenBatch) -> int:
    """Columns that the shrink output of a batch needs: the largest sum of ranks of any slot in it."""
    return max((sum(part.rank for part in factors.slices[slot]) for slot, _ in batch.key), default=0)


def shrink(x_TI: torch.Tensor, factors: BatchedFactors, batch: TokenBatch) -> torch.Tensor:
    """``h[t] = x[t, inputs] @ A.T``, zero where a token's slot has fewer rows or none: ``(T, shrink_width)``."""
    h_TW = x_TI.new_zeros(x_TI.shape[0], shrink_width(factors, batch))
    for run in factors.runs(batch):
        tokens = batch.tokens(run.first, run.count)
        tokens.put(h_TW[:, : run.width], _shrink_run(x_TI, run, tokens))
    return h_TW


def expand(y_TO: torch.Tensor, h_NTW: torch.Tensor, factors: BatchedFactors, batch: TokenBatch) -> None:
    """``y[t, outputs] += scaling * concat(h[0, t, rows], ..., h[N - 1, t, rows]) @ B.T`` in place, for each slice."""
    h_TNW = h_NTW.transpose(0, 1)
    for run in factors.runs(batch):
        tokens = batch.tokens(run.first, run.count)
        _expand_run(y_TO, tokens.take(h_TNW, run.expands[0].b_SRO.dtype), run, tokens)


def _shrink_run(x_TI: torch.Tensor, run: Run, tokens: Tokens) -> torch.Tensor:
    """``(S, K, W)``."""
    x_SKI = tokens.take(x_TI, run.shrinks[0][1].dtype)
    parts = [torch.bmm(x_SKI[:, :, inputs], a_SIR) for inputs, a_SIR in run.shrinks]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _expand_run(y_TO: torch.Tensor, h: torch.Tensor, run: Run, tokens: Tokens) -> None:
    """``h`` is ``(S, K, W)``, or ``(S, K, N, W)``."""
    y_SKO = tokens.take(y_TO, h.dtype)
    for product in run.expands:
        part = h[..., product.columns]
        part = part.flatten(2) if part.dim() == 4 else part
        # Not `baddbmm_`: into a part of the columns PyTorch would compute it slot by slot.
        if isinstance(product.scaling, torch.Tensor):
            y_SKO[:, :, product.outputs].add_(torch.bmm(part * product.scaling, product.b_SRO))
        else:
            y_SKO[:, :, product.outputs].add_(torch.bmm(part, product.b_SRO), alpha=product.scaling)
    tokens.put(y_TO, y_SKO)
