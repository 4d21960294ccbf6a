"""The conversion of one adapter: read a module, regroup its blocks, cut their rank, write it; then the next.

Memory holds a few modules at a time, whatever the size of the adapter.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from bdlora_sglang.adapter import BlockSide, LoRAModule
from bdlora_sglang.adapter.checkpoint import WEIGHTS_NAME, all_finite
from bdlora_sglang.adapter.config import CONFIG_NAME
from bdlora_sglang.adapter.names import peft_tensor_name
from bdlora_sglang.convert.blocks import Block, open_convertible, stored_factors
from bdlora_sglang.convert.folder import NewFolder
from bdlora_sglang.convert.lowrank import product_norm_sq, rounding_error_sq
from bdlora_sglang.convert.moments import Moments
from bdlora_sglang.convert.options import ConvertOptions
from bdlora_sglang.convert.peft_config import NewModule, new_config
from bdlora_sglang.convert.plan import Plan, Progress, Steps, in_order
from bdlora_sglang.convert.ranks import choose_ranks, needs_spectra
from bdlora_sglang.convert.report import ConversionReport, ModuleReport
from bdlora_sglang.convert.truncate import Errors, truncate_blocks
from bdlora_sglang.convert.writer import SafetensorsWriter, header_room
from bdlora_sglang.errors import AdapterError, BDLoRAError

_logger = logging.getLogger(__name__)
_README = "README.md"
# Weights of the source in another format would contradict the new ones.
_NOT_COPIED = {CONFIG_NAME, _README}
_WEIGHTS = "adapter_model*"


def convert(
    source: str | Path,
    destination: str | Path,
    options: ConvertOptions,
    operation: str = "reblock",
    progress: Progress | None = None,
) -> ConversionReport:
    """Write the adapter in folder ``source`` with ``options.nblocks`` blocks to the new folder ``destination``.

    `lora2bd`, `bd2lora` and `reblock` are this with the checks of their names.

    Args:
        source: a PEFT adapter folder, LoRA or BD-LoRA.
        destination: a folder that must not exist, or with ``options.force`` is replaced; its parent must exist.
        options: see `ConvertOptions`.
        operation: the name that metadata and model card give the conversion.
        progress: called from this thread with the steps done and their total.

    Returns:
        Errors, ranks and parameters, per module and together.

    Raises:
        AdapterError: the source cannot be used, by the same checks as the server's.
        BDLoRAError: options that contradict each other or the adapter, or an existing destination.
        OSError: a full disk, missing permissions. Source and destination are then as they were.
    """
    source, destination = Path(source), Path(destination)
    options.check()
    adapter = open_convertible(source)
    _refuse_overlap(source, destination)
    if adapter.ignored:
        _logger.warning("%s: left out, as PEFT does: %s", source, ", ".join(sorted(adapter.ignored)))
    plan = Plan.make(adapter, options)
    steps = Steps(
        len(adapter.modules) + (len(plan.converted) if needs_spectra(options) else 0),
        progress,
    )
    with NewFolder(destination, options.force) as folder:
        moments = _moments(plan, options)
        ranks = choose_ranks(plan, options, moments, steps)
        report = _write_weights(
            plan,
            options,
            ranks,
            moments,
            folder.path,
            steps,
            _Origin(operation, source, destination),
        )
        _write_config(plan, report, folder.path)
        _copy_others(source, folder.path, report)
        folder.commit()
    return report


def _refuse_overlap(source: Path, destination: Path) -> None:
    a, b = source.resolve(), destination.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise BDLoRAError(
            f"{destination}: found the source or a folder in or around it, expected one apart from {source}"
        )


def _moments(plan: Plan, options: ConvertOptions) -> Moments | None:
    """Collected from the text (and saved), or loaded; None without calibration."""
    if options.calibration is None:
        return None
    from bdlora_sglang.convert.calibrate import collect_moments

    if options.calibration.text is None:
        assert options.calibration.moments is not None  # by Calibration.check
        return Moments.load(Path(options.calibration.moments), plan)
    moments = collect_moments(plan, options.calibration)
    if options.calibration.moments is not None:
        moments.save(Path(options.calibration.moments))
    return moments


def _convert_module(
    plan: Plan,
    module: LoRAModule,
    rank: int | None,
    moments: Moments | None,
    norm_needed: bool,
) -> tuple[list[Block], Errors]:
    """The module's new blocks in the stored type, on the CPU, and their error with that type's rounding."""
    exact = plan.read(module)
    if rank is None:
        stored = _stored(plan, module, exact)
        return stored, _exact_errors(exact, stored, norm_needed)
    own = None if moments is None else moments.of(module.name, plan.compute_dtype, plan.device)
    blocks, errors = truncate_blocks(plan.for_computing(exact), plan.sides[module.name], rank, own)
    stored = _stored(plan, module, blocks)
    if plan.dtype is not plan.compute_dtype:
        rounding = sum(
            rounding_error_sq(block, Block(s.b.to(plan.device), s.a.to(plan.device)))
            for block, s in zip(blocks, stored, strict=True)
        )
        errors = replace(errors, error_sq=errors.error_sq + rounding)
    return stored, errors


def _stored(plan: Plan, module: LoRAModule, blocks: list[Block]) -> list[Block]:
    """In the result's type on the CPU; raises `AdapterError` where a value does not fit it."""
    stored = [Block(block.b.to("cpu", plan.dtype), block.a.to("cpu", plan.dtype)) for block in blocks]
    if torch.promote_types(blocks[0].a.dtype, plan.dtype) is plan.dtype:
        return stored
    for factor in (factor for block in stored for factor in (block.a, block.b)):
        if not all_finite(factor):
            subject = f"module '{module.name}'"
            raise AdapterError(
                plan.adapter.checkpoint.source, subject, f"values too large for {plan.dtype}", "its range"
            )
    return stored


def _exact_errors(exact: list[Block], stored: list[Block], norm_needed: bool) -> Errors:
    """None, unless the result's type is narrower. The norm only counts where other modules have errors."""
    narrower = any(
        torch.promote_types(e.a.dtype, s.a.dtype) is not s.a.dtype for e, s in zip(exact, stored, strict=True)
    )
    if not (narrower or norm_needed):
        return Errors(0.0, 0.0)
    wide = [Block(block.b.double(), block.a.double()) for block in exact]
    error_sq = sum(rounding_error_sq(e, s) for e, s in zip(wide, stored, strict=True)) if narrower else 0.0
    return Errors(error_sq, sum(product_norm_sq(block.b, block.a) for block in wide))


class _Origin:
    """What the metadata says of where an adapter comes from."""

    def __init__(self, operation: str, source: Path, destination: Path) -> None:
        self.operation, self.source, self.destination = operation, source, destination


def _write_weights(
    plan: Plan,
    options: ConvertOptions,
    ranks: Mapping[str, int] | None,
    moments: Moments | None,
    folder: Path,
    steps: Steps,
    origin: _Origin,
) -> ConversionReport:
    def work(module: LoRAModule) -> tuple[list[Block], Errors]:
        return _convert_module(plan, module, (ranks or {}).get(module.name), moments, ranks is not None)

    def report(modules: list[ModuleReport]) -> ConversionReport:
        return ConversionReport(
            operation=origin.operation,
            source=origin.source,
            destination=origin.destination,
            options=options.record(),
            modules=tuple(modules),
            dtype=plan.dtype,
            max_error=options.choice.max_error,
        )

    modules = plan.adapter.modules.values()
    saved = {f"base_model.model.{name}": tensor for name, tensor in plan.adapter.saved.items()}
    names = [*(name for module in modules for name in _tensor_names(module)), *saved]
    longest = report([_module_report(plan, module, 10**9, 10**15, _LONGEST_ERRORS) for module in modules])
    done: list[ModuleReport] = []
    with SafetensorsWriter(folder / WEIGHTS_NAME, plan.dtype, header_room(names, longest.metadata())) as writer:
        for module, (blocks, errors) in in_order(work, modules, options.threads, steps):
            before = writer.bytes_written
            for name, chunks in zip(
                _tensor_names(module),
                stored_factors(blocks, plan.sides[module.name]),
                strict=True,
            ):
                writer.add(name, chunks)
            parameters = (writer.bytes_written - before) // plan.dtype.itemsize
            rank = max(block.rank for block in blocks) * len(blocks)
            done.append(_module_report(plan, module, rank, parameters, errors))
        for name, tensor in saved.items():
            writer.add_as_it_is(name, plan.adapter.checkpoint.read_whole(tensor))
        result = report(done)
        writer.finish(result.metadata())
    return result


# A value whose text is as long as any, to leave room for in the header.
_LONGEST_ERRORS = Errors(1e-200, 1e100, 1e-200, 1e100, 1e-200)


def _tensor_names(module: LoRAModule) -> tuple[str, str]:
    """As PEFT saves them, whatever form the source's names have."""
    a, b = (peft_tensor_name(module.name, factor, module.is_embedding) for factor in "AB")
    return a, b


def _module_report(plan: Plan, module: LoRAModule, rank: int, parameters: int, errors: Errors) -> ModuleReport:
    return ModuleReport(
        name=module.name,
        side=plan.sides[module.name] if plan.nblocks > 1 else BlockSide.NONE,
        nblocks=plan.nblocks_of(module),
        source_rank=module.rank,
        rank=rank,
        source_parameters=module.num_parameters,
        parameters=parameters,
        scaling=module.scaling,
        errors=errors,
    )


def _write_config(plan: Plan, report: ConversionReport, folder: Path) -> None:
    modules = {module.name: NewModule(module.side, module.rank, module.scaling) for module in report.modules}
    config = new_config(plan.adapter.config, modules, plan.nblocks)
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def _copy_others(source: Path, folder: Path, report: ConversionReport) -> None:
    """The other files of the folder, links followed, and the model card with our section at its end."""
    for path in sorted(source.iterdir()):
        if path.name in _NOT_COPIED or path.name.startswith(".git") or path.match(_WEIGHTS):
            continue
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)
    card = source / _README
    text = card.read_bytes().rstrip(b"\n") + b"\n\n" if card.is_file() else b""  # in whatever encoding it is
    (folder / _README).write_bytes(text + report.model_card_section().encode("utf-8"))
