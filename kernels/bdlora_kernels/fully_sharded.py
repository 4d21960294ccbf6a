"""The two halves of S-LoRA's fully sharded mode in plain PyTorch; a collective exchanges the shrink output in between.

A slot's slices all read the rank's whole input, so their A factors form one matrix of ``sum(ranks)`` rows. B takes the
shrink outputs of N ranks: its columns are, rank by rank, the rows of that rank's A. Suffixes: N ranks, W columns of the
shrink output.
"""

from collections.abc import Sequence

import torch

from bdlora_kernels.layout import LayerFactors
from bdlora_kernels.segments import Segment


def shrink_width(factors: LayerFactors, segments: Sequence[Segment]) -> int:
    """Columns that the shrink output of a batch needs: the largest sum of ranks of any slot in it."""
    return max((sum(part.rank for part in factors.slices[segment.slot]) for segment in segments), default=0)


def shrink(x_TI: torch.Tensor, factors: LayerFactors, segments: Sequence[Segment]) -> torch.Tensor:
    """``h[t] = x[t, inputs] @ A.T``, zero where a token's slot has fewer rows or none: ``(T, shrink_width)``."""
    h_TW = x_TI.new_zeros(x_TI.shape[0], shrink_width(factors, segments))
    for segment in segments:
        slices = factors.slices[segment.slot]
        if not slices:
            continue
        first, rank = slices[0], sum(part.rank for part in slices)
        stop = first.a_offset + rank * first.input_size
        a = factors.a_SE[segment.slot, first.a_offset : stop].view(rank, first.input_size)
        inputs = slice(first.input_start, first.input_start + first.input_size)
        h_TW[segment.tokens, :rank] = x_TI[segment.tokens, inputs] @ a.T
    return h_TW


def expand(y_TO: torch.Tensor, h_NTW: torch.Tensor, factors: LayerFactors, segments: Sequence[Segment]) -> None:
    """``y[t, outputs] += scaling * concat(h[0, t, rows], ..., h[N - 1, t, rows]) @ B.T`` in place, for each slice."""
    for segment in segments:
        start = 0
        for part in factors.slices[segment.slot]:
            h = h_NTW[:, segment.tokens, start : start + part.rank].transpose(0, 1).flatten(1)
            start += part.rank
            stop = part.b_offset + part.output_size * h.shape[1]
            b = factors.b_SE[segment.slot, part.b_offset : stop].view(part.output_size, h.shape[1])
            outputs = slice(part.output_start, part.output_start + part.output_size)
            y_TO[segment.tokens, outputs] += part.scaling * (h @ b.T)
