"""``bdlora perf quality``: LoRA, BD-LoRA and conversions, trained and compared at equal parameters."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bdlora_cli.perf_output import check_output, finish, split, typed_command
from bdlora_sglang.errors import BDLoRAError

if TYPE_CHECKING:
    from bdlora_perf.quality.plan import QualityOptions


_NONE: tuple[object, ...] = (None, (), [])  # how typer has options that are not given


def quality(
    context: typer.Context,
    model: Annotated[Path, typer.Option(help="Folder of the base model.")],
    data: Annotated[
        list[Path], typer.Option(help="A task: .jsonl with prompt and completion, or a text file; repeatable.")
    ],
    methods: Annotated[
        list[str] | None, typer.Option(help="lora, bd, truncated, calibrated, healed; comma or repeat. Default: all.")
    ] = None,
    ranks: Annotated[list[str] | None, typer.Option(help="r of LoRA; comma or repeat. Default: 4, 8 and 16.")] = None,
    blocks: Annotated[list[str] | None, typer.Option(help="Of BD-LoRA; comma or repeat. Default: 8.")] = None,
    multiples: Annotated[
        list[str] | None, typer.Option(help="BD-LoRA's ranks over r, beside the matched one. Default: 2 and 4.")
    ] = None,
    inits: Annotated[
        list[str] | None,
        typer.Option(
            "--init", help="Of a block-diagonal A: per-block, whole-layer or peft. The first is the main one."
        ),
    ] = None,
    seeds: Annotated[list[str] | None, typer.Option(help="Comma or repeat. Default: 0 to 4.")] = None,
    learning_rates: Annotated[
        list[str] | None, typer.Option(help="Each method's best is taken. Default: 3e-4, 1e-3 and 3e-3.")
    ] = None,
    heal_learning_rates: Annotated[
        list[str] | None, typer.Option(help="Those of healing, which wants lower ones. Default: 1e-4, 3e-4 and 1e-3.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of training.")] = 200,
    heal_steps: Annotated[int | None, typer.Option(min=1, help="Of healing. Default: a fifth of --steps.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples of a step.")] = 16,
    sequence_length: Annotated[int, typer.Option(min=8, help="Tokens of an example at most.")] = 512,
    target_modules: Annotated[str, typer.Option(help="attention or all.")] = "all",
    scaling: Annotated[float, typer.Option(help="lora_alpha / r of every adapter.")] = 2.0,
    validation_examples: Annotated[int, typer.Option(min=1, help="To choose the learning rate by.")] = 128,
    test_examples: Annotated[int, typer.Option(min=1, help="To report.")] = 256,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="Of the training split.")] = 16384,
    speed: Annotated[
        Path | None, typer.Option(help="Throughput from this report of perf serve. Default: estimated.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="Of the estimate.")] = "a100",
    tp: Annotated[int | None, typer.Option(min=1, help="Of the estimate. Default: the largest of --blocks.")] = None,
    device: Annotated[str | None, typer.Option(help="As torch names it. Default: a GPU, else the CPU.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the frozen base. Default: float32 on a CPU, else bfloat16.")
    ] = None,
    part: Annotated[
        str, typer.Option(metavar="K/N", help="Do the K-th of N parts; parts may run side by side in one folder.")
    ] = "1/1",
    output: Annotated[Path, typer.Option(help="Folder for the runs and the report.")] = Path("perf-quality"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the runs in the folder.")] = False,
) -> None:
    """Fine-tune adapters with PEFT over seeds and learning rates; report loss, perplexity and accuracy.

    LoRA of each rank, BD-LoRA of its parameters and of multiples of its rank, and what `bdlora convert lora2bd` makes
    of the trained LoRA: truncated, calibrated, and healed by a short further fine-tune. The folder holds a file for
    each finished run: copied to another machine, it goes on there with the same command and --resume.
    """
    check_output(output, force=True)

    import torch

    from bdlora_perf.quality.plan import Plan, QualityOptions, check_plan, make_plan

    found = device or ("cuda" if torch.cuda.is_available() else "cpu")
    # The options are the plan's fields.
    given = {name: value for name, value in context.params.items() if name in Plan.model_fields and value not in _NONE}
    fields = {name: split(value) if isinstance(value, (list, tuple)) else value for name, value in given.items()}
    fields["heal_steps"] = heal_steps or max(1, steps // 5)
    fields["dtype"] = dtype or ("float32" if found == "cpu" else "bfloat16")
    plan = make_plan(model, data, fields)
    options = QualityOptions(
        plan=plan,
        model=model,
        data={path.stem: path for path in data},
        output=output,
        device=found,
        command=typed_command(),
        part=_part(part),
        speed=speed,
        gpu=gpu,
        tp=tp or max(plan.blocks),
    )
    check_plan(plan, output, resume)
    _measure(options)


def _measure(options: "QualityOptions") -> None:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn
    from transformers.utils import logging

    from bdlora_perf.quality.report import make_report, samples_of
    from bdlora_perf.quality.sweep import Sweep
    from bdlora_perf.report.run import Run

    console = Console()
    measured = Run(options.command, options.plan.seeds[0])
    logging.disable_progress_bar()  # one for each time that a model is loaded
    sweep = Sweep(options)
    options.plan.save(options.output)
    columns = (SpinnerColumn(), *Progress.get_default_columns(), MofNCompleteColumn())
    bar = Progress(*columns, console=console, refresh_per_second=1, speed_estimate_period=600)
    with measured.kept_when_interrupted(), bar as progress:
        task = progress.add_task("preparing", total=sweep.num_runs)
        try:
            for run in sweep.runs():
                progress.update(task, description=run.name)
                if not sweep.is_finished(run):
                    sweep.finish(run)
                progress.advance(task)
        finally:
            measured.samples.extend(samples_of(sweep))
    finish(console, make_report(sweep, measured), options.output)


def _part(text: str) -> tuple[int, int]:
    k, separator, n = text.partition("/")
    if not (separator and k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise BDLoRAError(f"--part: found {text!r}, expected K/N as 1/2")
    return int(k), int(n)
