"""The conversions by name, with the checks that belong to each."""

from dataclasses import replace
from pathlib import Path

from bdlora_sglang.convert.blocks import open_convertible
from bdlora_sglang.convert.convert import convert
from bdlora_sglang.convert.options import ConvertOptions
from bdlora_sglang.convert.plan import Progress
from bdlora_sglang.convert.report import ConversionReport
from bdlora_sglang.errors import BDLoRAError


def lora2bd(
    source: str | Path,
    destination: str | Path,
    options: ConvertOptions,
    lossless: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Make a BD-LoRA adapter from a plain LoRA adapter.

    ``lossless``: block k of a column-parallel module gets its own copy of A and its rows of B, block k of a
    row-parallel one its columns of A and its own copy of B; the whole rank grows from r to ``nblocks * r``. Otherwise
    ``options.choice`` picks a rank, and every block is the best of that rank (see `truncate_blocks`).

    Args:
        source: folder of the plain adapter.
        destination: new folder; see `convert`.
        options: ``nblocks`` is the TP degree that shall run without communication, at least 2.
        lossless: exact; excludes ``options.choice``.
        progress: see `convert`.

    Raises:
        BDLoRAError: the source is BD-LoRA already, ``lossless`` and a choice of rank are both or neither given, and
            all that `convert` raises.
    """
    if lossless != options.choice.exact:
        found = "--lossless and a rank" if lossless else "neither --lossless nor a rank"
        raise BDLoRAError(f"lora2bd: found {found}, expected --lossless, or --rank, --param-ratio or --max-error")
    if options.nblocks < 2:
        raise BDLoRAError(f"--nblocks: found {options.nblocks}, expected at least 2 (one block is a plain LoRA)")
    _require_kind(source, "LoRA", "bdlora convert reblock")
    return convert(source, destination, options, "lora2bd", progress)


def bd2lora(
    source: str | Path,
    destination: str | Path,
    options: ConvertOptions | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Make a plain LoRA adapter from a BD-LoRA adapter, exactly: the blocks side by side, zeros between them.

    The rank stays that of all blocks together, and is smaller where blocks repeat each other: what `lora2bd` made
    without loss becomes the first adapter again, bit for bit.

    Args:
        source: folder of the BD-LoRA adapter.
        destination: new folder; see `convert`.
        options: ``nblocks`` is ignored; None is exact.
        progress: see `convert`.

    Raises:
        BDLoRAError: the source is a plain LoRA, and all that `convert` raises.
    """
    _require_kind(source, "BD-LoRA", "nothing: it is a plain LoRA already")
    return convert(
        source,
        destination,
        replace(options or ConvertOptions(1), nblocks=1),
        "bd2lora",
        progress,
    )


def reblock(
    source: str | Path,
    destination: str | Path,
    options: ConvertOptions,
    progress: Progress | None = None,
) -> ConversionReport:
    """Give an adapter another number of blocks.

    Exact unless ``options.choice`` asks for an approximation: at the same rank when the new count divides the old one,
    else at a larger rank, by as many old blocks as one new block meets.

    Args:
        source: folder of a BD-LoRA (or plain) adapter.
        destination: new folder; see `convert`.
        options: ``nblocks`` is the new count.
        progress: see `convert`.

    Raises:
        BDLoRAError: see `convert`.
    """
    return convert(source, destination, options, "reblock", progress)


def _require_kind(source: str | Path, kind: str, instead: str) -> None:
    adapter = open_convertible(source)
    if adapter.kind != kind:
        raise BDLoRAError(f"{adapter.config.source}: found a {adapter.kind} adapter, expected {kind}; use {instead}")
