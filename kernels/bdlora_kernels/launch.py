"""Launchers of the Triton kernels: they check what they are given and choose the configuration.

Shape suffixes: T tokens, I inputs, O outputs, S slots, E elements of a slot, P partial sums, R columns of the shrink
output. Importing this module imports Triton.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bdlora_kernels.configurations import Configuration, Shape, choose_configuration
from bdlora_kernels.layout import LayerFactors
from bdlora_kernels.tables import ExpandTable, SegmentTable, ShrinkTable, SliceTables
from bdlora_kernels.triton_decode import fused_kernel
from bdlora_kernels.triton_expand import expand_kernel
from bdlora_kernels.triton_shrink import shrink_kernel

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Scratch:
    """Memory that all layers on a device share, one after the other.

    ``h`` is float32 and holds the shrink output; every element that is read was written in the same launch. The
    counters of the fused kernel are zero between launches.
    """

    h: torch.Tensor
    counters_G: torch.Tensor

    @classmethod
    def allocate(cls, max_tokens: int, h_size: int, max_splits: int, device: torch.device) -> "Scratch":
        """Room for batches of ``max_tokens`` tokens, ``h_size`` ranks each, in up to ``max_splits`` partial sums."""
        h = torch.empty(max_splits * max_tokens * h_size, dtype=torch.float32, device=device)
        return cls(h, torch.zeros(max_tokens, dtype=torch.int32, device=device))

    def h_PTR(self, splits: int, tokens: int, ranks: int) -> torch.Tensor:
        """The shrink output of one launch."""
        return self.h[: splits * tokens * ranks].view(splits, tokens, ranks)


def add_lora_delta_triton(
    y_TO: torch.Tensor,
    x_TI: torch.Tensor,
    factors: LayerFactors,
    tables: SliceTables,
    segments: SegmentTable,
    scratch: Scratch,
    configuration: Configuration | None = None,
) -> None:
    """``y[t, outputs] += scaling * (x[t, inputs] @ A.T) @ B.T`` in place, for each token t and each slice of its slot.

    One or two launches, whatever the batch; a captured launch serves every batch of at most as many tokens. Without
    a ``configuration``, it is the one for this device and shape.
    """
    tokens = x_TI.shape[0]
    if tokens == 0:
        return
    if configuration is None:
        configuration = configuration_for(x_TI, y_TO.shape[1], tables, segments)
    h_PTR = scratch.h_PTR(configuration.splits, tokens, tables.h_size)
    if configuration.fused:
        _shrink_and_expand(y_TO, x_TI, h_PTR, factors, tables, segments, scratch.counters_G, configuration)
    else:
        shrink(h_PTR, x_TI, factors.a_SE, tables.shrink, segments, configuration)
        expand(y_TO, h_PTR, factors.b_SE, tables.expand, segments, configuration)


def forward_with_base(
    base: Callable[[], torch.Tensor],
    outputs: int,
    x_TI: torch.Tensor,
    factors: LayerFactors,
    tables: SliceTables,
    segments: SegmentTable,
    scratch: Scratch,
    configuration: Configuration | None = None,
    second_stream: torch.cuda.Stream | None = None,
) -> torch.Tensor:
    """``base()``, a base layer's output of ``(T, outputs)``, with what `add_lora_delta_triton` adds.

    With ``configuration.overlap`` the shrink runs on ``second_stream`` while ``base`` runs, and a captured graph has
    both branches. Without a second stream, as on a CPU, they run one after the other.
    """
    tokens = x_TI.shape[0]
    if tokens == 0:
        return base()
    if configuration is None:
        configuration = configuration_for(x_TI, outputs, tables, segments)
    if not configuration.overlap:
        y_TO = base()
        add_lora_delta_triton(y_TO, x_TI, factors, tables, segments, scratch, configuration)
        return y_TO
    h_PTR = scratch.h_PTR(configuration.splits, tokens, tables.h_size)
    if second_stream is not None:
        # x is there, and the last layer has read its h.
        second_stream.wait_stream(torch.cuda.current_stream(x_TI.device))
    with torch.cuda.stream(second_stream):
        shrink(h_PTR, x_TI, factors.a_SE, tables.shrink, segments, configuration)
    y_TO = base()
    if second_stream is not None:
        torch.cuda.current_stream(x_TI.device).wait_stream(second_stream)
    expand(y_TO, h_PTR, factors.b_SE, tables.expand, segments, configuration)
    return y_TO


def make_second_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for `forward_with_base`, one for all layers of a device; None on a CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def configuration_for(x_TI: torch.Tensor, outputs: int, tables: SliceTables, segments: SegmentTable) -> Configuration:
    """The configuration of the device and the shape."""
    shape = Shape(x_TI.shape[0], x_TI.shape[1], outputs, segments.block_tokens, tables.shrink.block_rank)
    return choose_configuration(x_TI.device, shape)


def shrink(
    h_PTR: torch.Tensor,
    x_TI: torch.Tensor,
    a_SE: torch.Tensor,
    table: ShrinkTable,
    segments: SegmentTable,
    configuration: Configuration,
) -> None:
    """``h[:, t, rows] = x[t, inputs] @ A.T``, as P partial sums over the inputs; elements of no row are not touched."""
    _check_shrink(h_PTR, x_TI, a_SE, table, segments)
    grid = (segments.max_tiles(x_TI.shape[0]), table.row_programs, h_PTR.shape[0])
    shrink_kernel[grid](
        h_PTR, x_TI, a_SE, segments.tiles_GF, segments.tokens_T, table.entries_SEF,
        x_TI.stride(0), a_SE.stride(0), h_PTR.stride(0), h_PTR.stride(1), table.entries_SEF.stride(0),
        BLOCK_T=segments.block_tokens, BLOCK_K=configuration.block_k, BLOCK_R=table.block_rank, PDL=configuration.pdl,
        num_warps=configuration.shrink_warps, num_stages=configuration.shrink_stages,
        maxnreg=configuration.max_registers,
    )  # fmt: skip


def expand(
    y_TO: torch.Tensor,
    h_PTR: torch.Tensor,
    b_SE: torch.Tensor,
    table: ExpandTable,
    segments: SegmentTable,
    configuration: Configuration,
) -> None:
    """``y[t, outputs] += scaling * h[:, t, columns].sum(0) @ B.T`` in place, for each slice of the token's slot.

    With ``configuration.pdl`` the kernel before it on the stream must be the `shrink` that wrote ``h_PTR``.
    """
    _check_expand(y_TO, h_PTR, b_SE, table, segments)
    grid = (segments.max_tiles(y_TO.shape[0]), -(-y_TO.shape[1] // configuration.block_o))
    expand_kernel[grid](
        y_TO, h_PTR, b_SE, segments.tiles_GF, segments.tokens_T, table.entries_SEF,
        y_TO.shape[1], y_TO.stride(0), b_SE.stride(0), h_PTR.stride(0), h_PTR.stride(1),
        table.entries_SEF.stride(0),
        SPLITS=h_PTR.shape[0], BLOCK_T=segments.block_tokens, BLOCK_O=configuration.block_o,
        BLOCK_R=table.block_rank, PDL=configuration.pdl,
        num_warps=configuration.expand_warps, maxnreg=configuration.max_registers,
        **({"launch_pdl": True} if configuration.pdl else {}),
    )  # fmt: skip


def _shrink_and_expand(
    y_TO: torch.Tensor,
    x_TI: torch.Tensor,
    h_PTR: torch.Tensor,
    factors: LayerFactors,
    tables: SliceTables,
    segments: SegmentTable,
    counters_G: torch.Tensor,
    configuration: Configuration,
) -> None:
    _check_shrink(h_PTR, x_TI, factors.a_SE, tables.shrink, segments)
    _check_expand(y_TO, h_PTR, factors.b_SE, tables.expand, segments)
    tiles, outputs = segments.max_tiles(x_TI.shape[0]), y_TO.shape[1]
    assert tiles <= len(counters_G), (tiles, counters_G.shape)
    programs = tiles * (tables.shrink.row_programs * configuration.splits + -(-outputs // configuration.block_o))
    fused_kernel[(programs,)](
        y_TO, h_PTR, x_TI, factors.a_SE, factors.b_SE, segments.tiles_GF, segments.tokens_T,
        tables.shrink.entries_SEF, tables.expand.entries_SEF, counters_G,
        tiles, tables.shrink.row_programs, outputs,
        y_TO.stride(0), x_TI.stride(0), factors.a_SE.stride(0), factors.b_SE.stride(0), h_PTR.stride(0),
        h_PTR.stride(1), tables.shrink.entries_SEF.stride(0), tables.expand.entries_SEF.stride(0),
        SPLITS=configuration.splits, BLOCK_T=segments.block_tokens, BLOCK_K=configuration.block_k,
        SHRINK_BLOCK_R=tables.shrink.block_rank, BLOCK_O=configuration.block_o,
        EXPAND_BLOCK_R=tables.expand.block_rank,
        num_warps=configuration.shrink_warps, num_stages=configuration.shrink_stages,
        maxnreg=configuration.max_registers,
    )  # fmt: skip


def _check_shrink(
    h_PTR: torch.Tensor, x_TI: torch.Tensor, a_SE: torch.Tensor, table: ShrinkTable, segments: SegmentTable
) -> None:
    _check_h(h_PTR, x_TI, segments)
    assert x_TI.dtype == a_SE.dtype and x_TI.dtype in _DTYPES, (x_TI.dtype, a_SE.dtype)
    assert x_TI.stride(1) == 1 and a_SE.stride(1) == 1, (x_TI.stride(), a_SE.stride())
    assert len(a_SE) == len(table.entries_SEF), (a_SE.shape, table.entries_SEF.shape)
    assert x_TI.device == a_SE.device == table.entries_SEF.device == segments.tiles_GF.device == h_PTR.device


def _check_expand(
    y_TO: torch.Tensor, h_PTR: torch.Tensor, b_SE: torch.Tensor, table: ExpandTable, segments: SegmentTable
) -> None:
    _check_h(h_PTR, y_TO, segments)
    assert y_TO.dtype == b_SE.dtype and y_TO.dtype in _DTYPES, (y_TO.dtype, b_SE.dtype)
    assert y_TO.stride(1) == 1 and b_SE.stride(1) == 1, (y_TO.stride(), b_SE.stride())
    assert len(b_SE) == len(table.entries_SEF), (b_SE.shape, table.entries_SEF.shape)
    assert y_TO.device == b_SE.device == table.entries_SEF.device == segments.tiles_GF.device == h_PTR.device


def _check_h(h_PTR: torch.Tensor, rows: torch.Tensor, segments: SegmentTable) -> None:
    assert h_PTR.dtype == torch.float32 and h_PTR.is_contiguous(), (h_PTR.dtype, h_PTR.stride())
    assert h_PTR.shape[1] == rows.shape[0] <= segments.max_tokens, (h_PTR.shape, rows.shape, segments.max_tokens)
