"""``bdlora convert``: LoRA to BD-LoRA and back, what an adapter is, and how far two are apart."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bdlora_sglang.errors import BDLoRAError

if TYPE_CHECKING:
    from bdlora_sglang.convert import ConversionReport, ConvertOptions

app = typer.Typer(
    name="convert",
    help="Convert adapters between LoRA and BD-LoRA. SRC is an adapter folder, or a folder of adapters: then all are "
    "converted side by side into the folder DST, those that are done already are skipped, and a failure does not stop "
    "the rest.",
    no_args_is_help=True,
)

Source = Annotated[Path, typer.Argument(metavar="SRC", help="A PEFT adapter folder, or a folder of them.")]
Destination = Annotated[Path, typer.Argument(metavar="DST", help="The new folder.")]
NBlocks = Annotated[int, typer.Option("--nblocks", "--tp", help="Blocks of the result: the TP degree to serve at.")]
Rank = Annotated[int | None, typer.Option(help="Whole rank of every module, a multiple of the blocks.")]
ParamRatio = Annotated[
    float | None, typer.Option(help="Parameters over the source's, to two decimals: 0.87 and 1.74 are the paper's.")
]
MaxError = Annotated[
    float | None,
    typer.Option(
        help="Largest relative error of a module; ranks are chosen per module. With --rank or --param-ratio these are "
        "a budget, spent where it lowers the error most."
    ),
]
Calibrate = Annotated[Path | None, typer.Option(help="A text to minimise the error on activations over; see --model.")]
Model = Annotated[str | None, typer.Option(help="The base model, for transformers.")]
MomentsFile = Annotated[
    Path | None, typer.Option("--moments", help="Save the moments here; no --calibrate: reuse them.")
]
MaxTokens = Annotated[int, typer.Option(help="Tokens of the text that are used.")]
SequenceLength = Annotated[int, typer.Option(help="Tokens per forward pass.")]
BDA = Annotated[
    list[str] | None,
    typer.Option("--target-modules-bd-a", help="Row-parallel modules, by a part of the name; comma or repeat."),
]
BDB = Annotated[
    list[str] | None,
    typer.Option("--target-modules-bd-b", help="Column-parallel modules, by a part of the name; comma or repeat."),
]
KeepPlain = Annotated[bool, typer.Option("--keep-plain", help="Leave modules of no known side plain LoRA.")]
DType = Annotated[str | None, typer.Option("--dtype", help="Type of the result; default: the source's.")]
ComputeDType = Annotated[str | None, typer.Option(help="float32 or float64, of the decompositions.")]
Device = Annotated[str, typer.Option(help="Where the decompositions run, e.g. cuda.")]
Threads = Annotated[int | None, typer.Option(help="Modules (many adapters: adapters) at a time; default: the cores.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing DST.")]
Plot = Annotated[Path | None, typer.Option(help="Draw error against parameters to this .png or .svg (matplotlib).")]


@app.command()
def lora2bd(
    source: Source,
    destination: Destination,
    nblocks: NBlocks,
    lossless: Annotated[bool, typer.Option("--lossless", help="Exact, at nblocks times the rank.")] = False,
    rank: Rank = None,
    param_ratio: ParamRatio = None,
    max_error: MaxError = None,
    calibrate: Calibrate = None,
    model: Model = None,
    moments: MomentsFile = None,
    max_tokens: MaxTokens = 65536,
    sequence_length: SequenceLength = 512,
    target_modules_bd_a: BDA = None,
    target_modules_bd_b: BDB = None,
    keep_plain: KeepPlain = False,
    dtype: DType = None,
    compute_dtype: ComputeDType = None,
    device: Device = "cpu",
    threads: Threads = None,
    force: Force = False,
    plot: Plot = None,
) -> None:
    """Make a BD-LoRA adapter of a plain LoRA: --lossless, or the best one by --rank, --param-ratio or --max-error."""
    from bdlora_sglang.convert import Calibration, ConvertOptions, RankChoice, lora2bd

    calibration = None
    if calibrate is not None or model is not None or moments is not None:
        text, saved = (None if path is None else str(path) for path in (calibrate, moments))
        calibration = Calibration(text, model, saved, max_tokens, sequence_length)
    options = ConvertOptions(
        nblocks=nblocks,
        choice=RankChoice(rank, param_ratio, max_error),
        target_modules_bd_a=_split_commas(target_modules_bd_a),
        target_modules_bd_b=_split_commas(target_modules_bd_b),
        keep_plain=keep_plain,
        calibration=calibration,
        dtype=dtype,
        compute_dtype=compute_dtype,
        device=device,
        threads=threads or os.cpu_count() or 1,
        force=force,
        plot=None if plot is None else str(plot),
    )
    _run(lora2bd, "lora2bd", source, destination, options, lossless)


@app.command()
def bd2lora(
    source: Source,
    destination: Destination,
    dtype: DType = None,
    threads: Threads = None,
    force: Force = False,
) -> None:
    """Make a plain LoRA of a BD-LoRA adapter, exactly, with the zeros between the blocks stored."""
    from bdlora_sglang.convert import ConvertOptions, bd2lora

    options = ConvertOptions(nblocks=1, dtype=dtype, threads=threads or os.cpu_count() or 1, force=force)
    _run(bd2lora, "bd2lora", source, destination, options)


@app.command()
def reblock(
    source: Source,
    destination: Destination,
    nblocks: NBlocks,
    rank: Rank = None,
    param_ratio: ParamRatio = None,
    max_error: MaxError = None,
    dtype: DType = None,
    compute_dtype: ComputeDType = None,
    device: Device = "cpu",
    threads: Threads = None,
    force: Force = False,
    plot: Plot = None,
) -> None:
    """Change the number of blocks: exactly, by a larger rank where it must be, or to the rank that is asked for."""
    from bdlora_sglang.convert import ConvertOptions, RankChoice, reblock

    options = ConvertOptions(
        nblocks=nblocks,
        choice=RankChoice(rank, param_ratio, max_error),
        dtype=dtype,
        compute_dtype=compute_dtype,
        device=device,
        threads=threads or os.cpu_count() or 1,
        force=force,
        plot=None if plot is None else str(plot),
    )
    _run(reblock, "reblock", source, destination, options)


@app.command()
def inspect(path: Annotated[Path, typer.Argument(help="A PEFT adapter folder.")]) -> None:
    """Show kind, blocks, ranks, sides, modules, parameters, and bytes per GPU in three ways of serving."""
    from bdlora_cli.convert_tables import print_summary
    from bdlora_sglang.convert import inspect_adapter

    print_summary(inspect_adapter(path))


@app.command()
def verify(
    a: Annotated[Path, typer.Argument(metavar="A", help="The adapter that errors are relative to.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The other adapter.")],
    max_error: Annotated[
        float | None, typer.Option(help="Exit with 1 when a module's Frobenius error is larger.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Also compare log probabilities on this base model.")] = None,
    prompt: Annotated[str, typer.Option(help="The prompt for --model.")] = "The capital of France is",
    device: Device = "cpu",
) -> None:
    """Compare the deltas of two adapters, module by module, whatever their blocks."""
    from bdlora_cli.convert_tables import print_differences, print_logprobs
    from bdlora_sglang.convert import compare_deltas, compare_logprobs

    differences = list(compare_deltas(a, b, device))
    print_differences(differences)
    if model is not None:
        print_logprobs(compare_logprobs(a, b, model, prompt, device))
    worst = max(differences, key=lambda difference: difference.frobenius)
    if max_error is not None and worst.frobenius > max_error:
        raise BDLoRAError(
            f"{b}: module '{worst.module}': found error {worst.frobenius:.3e}, expected at most {max_error}"
        )


def _split_commas(values: list[str] | None) -> tuple[str, ...] | None:
    return None if not values else tuple(part.strip() for value in values for part in value.split(",") if part.strip())


def _run(
    convert: "Callable[..., ConversionReport]",
    operation: str,
    source: Path,
    destination: Path,
    options: "ConvertOptions",
    *arguments: Any,
) -> None:
    """Convert one adapter, or all in a folder."""
    from bdlora_cli.convert_tables import one_bar, print_report
    from bdlora_sglang.convert import find_adapters

    options.check()
    sources = find_adapters(source)
    if sources:
        _run_many(convert, operation, sources, destination, options, *arguments)
        return
    try:
        with one_bar(source.name) as progress:
            report = convert(source, destination, options, *arguments, progress=progress)
    except OSError as error:
        raise BDLoRAError(f"{destination}: {error}") from error
    print_report(report)


def _run_many(
    convert: "Callable[..., ConversionReport]",
    operation: str,
    sources: list[Path],
    destination: Path,
    options: "ConvertOptions",
    *arguments: Any,
) -> None:
    from dataclasses import replace

    from bdlora_cli.convert_tables import bars, print_results
    from bdlora_sglang.convert import Job, Outcome, convert_all

    if options.plot is not None or (options.calibration is not None and options.calibration.moments is not None):
        raise BDLoRAError("--plot, --moments: found a folder of adapters, expected one adapter: they name one file")
    destination.mkdir(parents=True, exist_ok=True)
    each = replace(options, threads=1)
    jobs = [
        Job(source, destination / source.name, convert, (each, *arguments), operation, each.record(), each.force)
        for source in sources
    ]
    with bars() as progress:
        results = list(convert_all(jobs, options.threads, progress))
    print_results(results)
    if any(result.outcome is Outcome.FAILED for result in results):
        sys.exit(1)
