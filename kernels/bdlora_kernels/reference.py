"""The plain PyTorch kernel: what the CPU runs, and what every other kernel is compared with."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch

from bdlora_kernels.layout import LayerFactors, Slice
from bdlora_kernels.segments import Segment


def add_lora_delta(y_TO: torch.Tensor, x_TI: torch.Tensor, factors: LayerFactors, segments: Sequence[Segment]) -> None:
    """``y[t, outputs] += scaling * (x[t, inputs] @ A.T) @ B.T`` in place, for each token t and each slice of its slot.

    One matrix product a segment for the A factors that read the same inputs, and one for each slice's B; no loop over
    tokens. Tokens in no segment are not touched. Types narrower than float32 are multiplied as they are, as in PEFT.
    """
    for segment in segments:
        slices = factors.slices[segment.slot]
        if not slices:
            continue
        contiguous = isinstance(segment.tokens, slice)
        x = x_TI[segment.tokens]
        y = y_TO[segment.tokens]  # a view when the tokens are neighbours, else a copy that is written back
        for group in _same_inputs(slices):
            _add_group(y, x, factors, segment.slot, group)
        if not contiguous:
            y_TO[segment.tokens] = y


def _same_inputs(slices: tuple[Slice, ...]) -> Iterator[list[Slice]]:
    """Runs of slices that read the same inputs, and whose A factors are one matrix."""
    for _, group in groupby(slices, key=lambda part: (part.input_start, part.input_size)):
        yield list(group)


def _add_group(y: torch.Tensor, x: torch.Tensor, factors: LayerFactors, slot: int, group: list[Slice]) -> None:
    first = group[0]
    rank = sum(part.rank for part in group)
    stop = first.a_offset + rank * first.input_size
    a = factors.a_SE[slot, first.a_offset : stop].view(rank, first.input_size)
    h = x[:, first.input_start : first.input_start + first.input_size] @ a.T
    start = 0
    for part in group:
        h_part = h[:, start : start + part.rank]
        start += part.rank
        y_part = y[:, part.output_start : part.output_start + part.output_size]
        y_part.addmm_(h_part, factors.b(slot, part).T, alpha=part.scaling)
