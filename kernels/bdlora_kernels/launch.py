"""Launchers of the Triton kernels: they check what they are given and run the configuration that is chosen.

Shape suffixes: T tokens, I inputs, O outputs, S slots, E elements of a slot, R columns of the shrink output, P partial
sums. Importing this module imports Triton.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bdlora_kernels.configurations import Configuration, Configurations, Shape, device_configurations
from bdlora_kernels.layout import Exchange, LayerFactors
from bdlora_kernels.tables import ExpandTable, SegmentTable, ShrinkTable, SliceTables
from bdlora_kernels.triton_expand import expand_kernel
from bdlora_kernels.triton_lookup import lookup_kernel
from bdlora_kernels.triton_shrink import shrink_kernel

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its grid, its arguments in order, and its constants and options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]

    def run(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.options)


@dataclass(frozen=True)
class Scratch:
    """Memory that all layers on a device share, one after the other.

    Both are float32: ``h`` is the shrink output (it may be looked at as another type), ``partial`` holds the sums of
    the splits before they are added up. Every element that is read was written by the same shrink.
    """

    h: torch.Tensor
    partial: torch.Tensor

    @classmethod
    def allocate(cls, max_tokens: int, h_size: int, max_partial_tokens: int, device: torch.device) -> "Scratch":
        """Room for ``max_tokens`` tokens of ``h_size`` ranks; ``max_partial_tokens`` are tokens times splits."""
        h, partial = (
            torch.empty(tokens * h_size, dtype=torch.float32, device=device)
            for tokens in (max_tokens, max_partial_tokens)
        )
        return cls(h, partial)

    @classmethod
    def for_segments(
        cls, segments: SegmentTable, configurations: Configurations, h_size: int, device: torch.device
    ) -> "Scratch":
        """Room for whatever batches ``segments`` hold, and whatever configurations are chosen for them."""
        partial_tokens = configurations.max_partial_tokens(segments.max_tokens, segments.block_tokens)
        return cls.allocate(segments.max_tokens, h_size, partial_tokens, device)

    def h_TR(self, tokens: int, ranks: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The shrink output of one launch."""
        return self.h.view(dtype)[: tokens * ranks].view(tokens, ranks)


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

    Two launches, whatever the batch; a captured launch serves every batch of at most as many tokens. Without a
    ``configuration``, it is the one for this device and shape.
    """
    forward_with_base(
        lambda: y_TO, y_TO.shape[1], x_TI, factors, tables, segments, scratch, configuration, second_stream=None
    )


def add_embedding_delta_triton(
    y_TO: torch.Tensor,
    ids_T: torch.Tensor,
    first_id: int,
    factors: LayerFactors,
    tables: SliceTables,
    segments: SegmentTable,
    scratch: Scratch,
    configuration: Configuration,
) -> None:
    """``y[t] += scaling * A[:, ids[t] - first_id] @ B.T`` in place, for each token t of an A that has its column."""
    h_TR = scratch.h_TR(len(ids_T), tables.h_size)
    lookup_launch(h_TR, ids_T, first_id, factors.a_SE, tables.shrink, segments).run()
    expand_launch(y_TO, h_TR, factors.b_SE, tables.expand, segments, configuration).run()


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
    exchange: Exchange | None = None,
) -> torch.Tensor:
    """``base()``, a base layer's output of ``(T, outputs)``, with the delta of each token's slot added in place.

    With ``configuration.overlap`` the shrink and the ``exchange`` of its output run on ``second_stream`` while ``base``
    runs, and a captured graph has both branches. Without a second stream, as on a CPU, they run one after the other.
    """
    tokens = x_TI.shape[0]
    if tokens == 0:
        return base()
    if configuration is None:
        shape = shape_of(x_TI, outputs, tables, segments, exchange is not None)
        configuration = device_configurations(x_TI.device).choose(shape)
    assert exchange is None or not configuration.pdl, "the expand comes after another kernel than the shrink"
    own_TR = scratch.h_TR(tokens, tables.h_size, torch.float32 if exchange is None else x_TI.dtype)
    launch = shrink_launch(own_TR, x_TI, factors, tables, segments, scratch.partial, configuration)

    def shrink() -> torch.Tensor:
        launch.run()
        return own_TR if exchange is None else exchange(own_TR)

    if not configuration.overlap:
        y_TO = base()
        h_TR = shrink()
    else:
        if second_stream is not None:
            # x is there, and the last layer has read its h.
            second_stream.wait_stream(torch.cuda.current_stream(x_TI.device))
        with torch.cuda.stream(second_stream):
            # What the exchange allocates is this stream's, which waits as above before it can use it again.
            h_TR = shrink()
        y_TO = base()
        if second_stream is not None:
            torch.cuda.current_stream(x_TI.device).wait_stream(second_stream)
    expand_launch(y_TO, h_TR, factors.b_SE, tables.expand, segments, configuration).run()
    return y_TO


def make_second_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for `forward_with_base`, one for all layers of a device; None on a CPU.

    It is ours alone: PyTorch hands the streams of its pool out again and again, the caller's own among them. Its
    kernels go first where multiprocessors are short, as the base layer's product has more to do.
    """
    if device.type != "cuda":
        return None
    # torch requires it.
    from cuda.bindings import runtime  # type: ignore[import-untyped, unused-ignore]

    with torch.cuda.device(device):
        error, _, first = runtime.cudaDeviceGetStreamPriorityRange()
        if error == runtime.cudaError_t.cudaSuccess:
            error, stream = runtime.cudaStreamCreateWithPriority(runtime.cudaStreamNonBlocking, first)
    if error != runtime.cudaError_t.cudaSuccess:
        raise RuntimeError(f"cudaStreamCreateWithPriority: found {error.name}, expected cudaSuccess")
    return torch.cuda.ExternalStream(int(stream), device=device)  # type: ignore[no-untyped-call]


def shape_of(
    x_TI: torch.Tensor, outputs: int, tables: SliceTables, segments: SegmentTable, exchanged: bool = False
) -> Shape:
    """What a configuration is chosen by."""
    tokens, inputs = x_TI.shape
    return Shape(
        tokens=tokens,
        tiles=segments.max_tiles(tokens),
        inputs=inputs,
        outputs=outputs,
        block_tokens=segments.block_tokens,
        shrink_rank=tables.shrink.block_rank,
        row_programs=tables.shrink.row_programs,
        expand_rank=tables.expand.block_rank,
        expand_width=tables.expand.width,
        exchanged=exchanged,
    )


def shrink_launch(
    h_TR: torch.Tensor,
    x_TI: torch.Tensor,
    factors: LayerFactors,
    tables: SliceTables,
    segments: SegmentTable,
    partial: torch.Tensor,
    configuration: Configuration,
) -> Launch:
    """``h[t, rows] = x[t, inputs] @ A.T``; elements of no row are not touched."""
    table, a_SE, b_SE = tables.shrink, factors.a_SE, factors.b_SE
    tokens, splits = x_TI.shape[0], configuration.splits
    _check(h_TR, x_TI, a_SE, table.entries_SEF, segments)
    tiles = segments.max_tiles(tokens)
    assert splits == 1 or splits * h_TR.numel() <= len(partial), (splits, h_TR.shape, partial.shape)
    assert tiles * table.row_programs <= len(segments.counters), (tiles, table.row_programs, segments.counters.shape)
    return Launch(
        shrink_kernel,
        (tiles, table.row_programs, splits),
        (
            h_TR, partial, segments.counters, x_TI, a_SE, b_SE, segments.tiles_GF, segments.tokens_T,
            table.entries_SEF, tables.expand.entries_SEF,
            x_TI.stride(0), a_SE.stride(0), b_SE.stride(0), h_TR.stride(0), h_TR.numel(),
            table.entries_SEF.stride(0), tables.expand.entries_SEF.stride(0),
        ),
        {
            "SPLITS": splits, "BLOCK_T": segments.block_tokens, "BLOCK_K": configuration.block_k,
            "BLOCK_R": table.block_rank, "STAGES": configuration.shrink_stages,
            "ENTRIES": tables.expand.first_entries, "PREFETCH": configuration.overlap,
            "PREFETCH_B": configuration.prefetch_b, "PDL": configuration.pdl,
            "num_warps": configuration.shrink_warps, "maxnreg": configuration.shrink_registers,
        },
    )  # fmt: skip


def lookup_launch(
    h_TR: torch.Tensor,
    ids_T: torch.Tensor,
    first_id: int,
    a_SE: torch.Tensor,
    table: ShrinkTable,
    segments: SegmentTable,
) -> Launch:
    """``h[t, rows] = A[:, ids[t] - first_id]``, 0 where A has no such column."""
    assert ids_T.shape == h_TR.shape[:1] and ids_T.is_contiguous(), (ids_T.shape, ids_T.stride(), h_TR.shape)
    assert not ids_T.is_floating_point() and len(ids_T) <= segments.max_tokens, (ids_T.dtype, segments.max_tokens)
    return Launch(
        lookup_kernel,
        (segments.max_tiles(len(ids_T)),),
        (
            h_TR, ids_T, a_SE, segments.tiles_GF, segments.tokens_T, table.entries_SEF,
            first_id, a_SE.stride(0), h_TR.stride(0), table.entries_SEF.stride(0),
        ),
        {"BLOCK_T": segments.block_tokens, "BLOCK_R": table.block_rank},
    )  # fmt: skip


def expand_launch(
    y_TO: torch.Tensor,
    h_TR: torch.Tensor,
    b_SE: torch.Tensor,
    table: ExpandTable,
    segments: SegmentTable,
    configuration: Configuration,
) -> Launch:
    """``y[t, outputs] += scaling * h[t, columns] @ B.T`` in place, for each slice of the token's slot.

    ``h_TR`` has the rows of all TP ranks whose shrink outputs the table's B takes, one rank's below the other's. With
    ``configuration.pdl`` the kernel before it on the stream must be the one that wrote ``h_TR``.
    """
    _check(h_TR, y_TO, b_SE, table.entries_SEF, segments, table.gathered)
    tokens_at_once = min(configuration.tokens_at_once, segments.block_tokens)
    return Launch(
        expand_kernel,
        (-(-y_TO.shape[1] // configuration.block_o), segments.max_tiles(y_TO.shape[0])),
        (
            y_TO, h_TR, b_SE, segments.tiles_GF, segments.tokens_T, table.entries_SEF,
            y_TO.shape[1], y_TO.stride(0), b_SE.stride(0), h_TR.stride(0), y_TO.shape[0] * h_TR.stride(0),
            table.entries_SEF.stride(0),
        ),
        {
            "ENTRIES": table.first_entries, "WIDTH": table.width, "GATHERED": table.gathered,
            "BLOCK_T": tokens_at_once, "BLOCK_O": configuration.block_o, "BLOCK_R": configuration.block_r,
            "PDL": configuration.pdl,
            "num_warps": configuration.expand_warps, "maxnreg": configuration.expand_registers,
            **({"launch_pdl": True} if configuration.pdl else {}),
        },
    )  # fmt: skip


def _check(
    h_TR: torch.Tensor,
    rows: torch.Tensor,
    factors_SE: torch.Tensor,
    entries: torch.Tensor,
    segments: SegmentTable,
    gathered: int = 1,
) -> None:
    assert h_TR.dtype in (torch.float32, rows.dtype) and h_TR.is_contiguous(), (h_TR.dtype, h_TR.stride())
    assert h_TR.shape[0] == gathered * rows.shape[0], (h_TR.shape, gathered, rows.shape)
    assert rows.shape[0] <= segments.max_tokens, (rows.shape, segments.max_tokens)
    assert rows.dtype == factors_SE.dtype and rows.dtype in _DTYPES, (rows.dtype, factors_SE.dtype)
    assert rows.stride(1) == 1 and factors_SE.stride(1) == 1, (rows.stride(), factors_SE.stride())
    assert len(factors_SE) == len(entries), (factors_SE.shape, entries.shape)
    assert rows.device == factors_SE.device == entries.device == segments.tiles_GF.device == h_TR.device
