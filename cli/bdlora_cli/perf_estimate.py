"""``bdlora perf estimate``: which rank and block count for a model, GPUs and traffic, by arithmetic alone."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from bdlora_cli.perf_output import check_output, typed_command
from bdlora_perf.estimate.traffic import Distribution, Traffic

if TYPE_CHECKING:
    from bdlora_perf.estimate.report import Estimate


def estimate(
    model: Annotated[str, typer.Option(help="A short name such as llama-3.1-70b, a model folder or a config.json.")],
    gpu: Annotated[str, typer.Option(help="a100, a100-40gb, h100, h200, b200 or l40s.")] = "a100",
    tp: Annotated[int, typer.Option("--tp", help="TP degree.")] = 8,
    concurrency: Annotated[int, typer.Option(help="Requests under way at any time.")] = 32,
    input_len: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 1024,
    output_len: Annotated[int, typer.Option(help="Tokens of an answer.")] = 128,
    adapters: Annotated[int, typer.Option(help="Adapters in GPU memory.")] = 8,
    distribution: Annotated[
        Distribution, typer.Option(help="Of requests over adapters, as in SGLang's load generator.")
    ] = Distribution.UNIFORM,
    rank: Annotated[list[int] | None, typer.Option(help="Rank of plain LoRA; repeatable. Default: 16 and 64.")] = None,
    blocks: Annotated[
        list[int] | None, typer.Option(help="Blocks of BD-LoRA; repeatable. Default: TP/2, TP and 2 TP.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write a report to this folder.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a report in the folder.")] = False,
    sources: Annotated[bool, typer.Option("--sources", help="Show where every constant is from.")] = False,
) -> None:
    """Estimate LoRA serving under TP, with BD-LoRA and without. Nothing is measured, and no GPU is needed."""
    from bdlora_perf.estimate.report import make_estimate, make_report, source_lines
    from bdlora_perf.report.run import Run

    run = Run(typed_command(), seed=0)
    if output is not None:
        check_output(output, force)
    traffic = Traffic(concurrency, input_len, output_len, adapters, distribution)
    made = make_estimate(model, gpu, tp, traffic, rank or (16, 64), blocks or ())
    console = Console()
    for lora_rank in made.systems:
        _print_steps(console, made, lora_rank)
        _print_candidates(console, made, lora_rank)
    _print_headlines(console)
    if sources:
        console.print(f"\nEstimate: constants for {made.deployment.gpu.label}", style="italic")
        for line in source_lines(made.deployment.gpu):
            console.print(line, highlight=False, soft_wrap=True, markup=False)
    if output is not None:
        from bdlora_perf.report.render import write_report

        written = write_report(make_report(made, run), output)
        console.print(f"Estimate written: {', '.join(map(str, written))}", soft_wrap=True, markup=False)


def _print_steps(console: Console, made: "Estimate", lora_rank: int) -> None:
    """Milliseconds of one step of every baseline and of what is suggested."""
    deployment, traffic = made.deployment, made.traffic
    table = Table(
        Column("system", no_wrap=True),
        *_figures("rank", "prefill", "decode", "LoRA", "sent", "token/s"),
        title=f"Estimate: LoRA r = {lora_rank}, {escape(deployment.shape.name)} on {deployment.tp} x "
        f"{deployment.gpu.label}\nconcurrency {traffic.concurrency}, {traffic.input_len} + {traffic.output_len} tokens"
        f", adapters {traffic.adapters}, {traffic.distribution.value}",
        caption="ms of one step; LoRA and sent are parts of the decode step",
    )
    hidden = [candidate.serving for candidate in made.candidates[lora_rank] if candidate.purpose is None]
    for serving, requests in made.systems[lora_rank]:
        if serving not in hidden:
            step = requests.decode
            parts = (requests.prefill.seconds, step.seconds, step.lora + step.lora_launches, step.lora_collectives)
            milliseconds = (f"{part * 1e3:.2f}" for part in parts)
            table.add_row(serving.label, str(serving.rank or "-"), *milliseconds, f"{requests.output_throughput:,.0f}")
    console.print(table)


def _print_candidates(console: Console, made: "Estimate", lora_rank: int) -> None:
    """BD-LoRA of every rank and block count, and what is suggested."""
    table = Table(
        Column("adapter", no_wrap=True),
        *_figures("rank", "size", "S-LoRA", "triton_v2", "MiB", no_wrap=True),
        Column("for", no_wrap=True),
        title=f"Estimate: BD-LoRA in place of LoRA r = {lora_rank}",
        caption="size: parameters over LoRA's; S-LoRA, triton_v2: output throughput over theirs,\n"
        "at least and at most, by assumption; MiB: one adapter on one GPU",
    )
    candidates = made.candidates[lora_rank]
    for candidate in candidates:
        table.add_row(
            candidate.serving.label,
            str(candidate.serving.rank),
            f"{candidate.parameter_ratio:.2f}",
            *(f"{low:.2f}-{high:.2f}" for low, high in (candidate.over_s_lora, candidate.over_replicated)),
            f"{candidate.adapter_bytes / 2**20:.0f}",
            candidate.purpose or ("" if candidate.fits else "no fit"),
            style="bold" if candidate.purpose else None,
        )
    console.print(table)
    suggested = [candidate for candidate in candidates if candidate.purpose]
    for candidate in suggested:
        console.print(f"Estimate. {candidate.suggestion()}")
    if not suggested:
        console.print("Estimate. Nothing is suggested: no candidate fits the GPUs and gains.", style="yellow")
    console.print()


def _print_headlines(console: Console) -> None:
    from bdlora_perf.estimate.lora_cost import ASSUMPTIONS
    from bdlora_perf.estimate.model_shape import SHAPES
    from bdlora_perf.estimate.paper import CAVEATS, compare_headlines

    table = Table(
        Column("model", no_wrap=True),
        *_figures("params", "paper", *(known.name for known in ASSUMPTIONS), "needs [us]"),
        title="Estimate: the paper's speed-ups over S-LoRA (8 x A100, TP 8, up to) beside ours",
    )
    for comparison in compare_headlines():
        needed = comparison.needed_latency
        ratios = (comparison.parameter_ratio, comparison.headline.speed_up, *comparison.speed_ups.values())
        table.add_row(
            SHAPES[comparison.headline.model].name,
            *(f"{ratio:.2f}x" for ratio in ratios),
            "-" if needed is None else f"{needed * 1e6:.0f}",
        )
    console.print(table)
    console.print("Needs: the latency of each of LoRA's collectives that would give the paper's figure.")
    for text in CAVEATS:
        console.print(text, highlight=False)


def _figures(*headers: str, no_wrap: bool = False) -> list[Column]:
    return [Column(header, justify="right", no_wrap=no_wrap) for header in headers]
