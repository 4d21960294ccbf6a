"""``bdlora perf swap``: loading adapters into running servers."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from bdlora_cli.perf_output import SYNTHETIC, check_output, make_synthetic_model, print_report
from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.model_names import resolve_model


def swap(
    server_flags: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- FLAGS...]", help="Flags of bdlora launch, for every server; absolute paths."),
    ] = None,
    model: Annotated[
        str, typer.Option(help=f"Path, repo id or short name; '{SYNTHETIC}': a random Llama made on the fly.")
    ] = SYNTHETIC,
    hidden_size: Annotated[int, typer.Option(min=1, help="Of the synthetic model.")] = 1024,
    layers: Annotated[int, typer.Option("--layers", "--num-layers", min=1, help="Of the synthetic model.")] = 16,
    tp: Annotated[list[int] | None, typer.Option(min=1, help="TP degree; repeatable. Default: 1 and 2.")] = None,
    rank: Annotated[
        list[int] | None,
        typer.Option(min=1, help="r of the adapters; BD-LoRA's is 2r. Repeatable. Default: 8 and 64."),
    ] = None,
    loads: Annotated[int, typer.Option(min=1, help="Adapters loaded in a turn, alone and beside a stream.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each system at each point.")] = 3,
    before: Annotated[
        Path | None, typer.Option(metavar="CHECKOUT", help="Another checkout of this project, to measure beside it.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the model, the adapters and the prompts.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("perf-swap"),
    work: Annotated[Path, typer.Option(help="Folder for models, adapters and logs, used again.")] = Path(".perf"),
    force: Annotated[bool, typer.Option("--force", help="Replace a report in the folder.")] = False,
) -> None:
    """Time loading adapters, the first token with a cold and a warm one, and gaps in a stream meanwhile.

    A server for each TP degree, one of each checkout at a time, and adapters of each rank. Ctrl-C ends the servers and
    keeps what is measured.
    """
    check_output(output, force)

    import torch
    from rich.console import Console

    from bdlora_perf.engine.bandwidth import shape_of
    from bdlora_perf.report.render import write_report
    from bdlora_perf.swap.measure import INTERRUPTED, measure_swap
    from bdlora_perf.swap.plan import LORA, SwapOptions

    tps, ranks = list(dict.fromkeys(tp or (1, 2))), sorted(set(rank or (8, 64)))
    path = make_synthetic_model(work, hidden_size, layers, seed) if model == SYNTHETIC else resolve_model(model)
    shape = shape_of(path)
    for degree in tps:
        shape.check_tp(degree)
        for r in ranks:
            LORA.adapter(r, degree)
    flags = list(server_flags or ())
    if not torch.accelerator.is_available() and "--mem-fraction-static" not in flags:
        # SGLang takes what the servers beside it have allocated for its own.
        flags = ["--mem-fraction-static", "0.9", *flags]
    options = SwapOptions(
        model=path,
        vocabulary=shape.vocabulary,
        tps=tps,
        ranks=ranks,
        loads=loads,
        rounds=rounds,
        seed=seed,
        before=before,
        server_flags=flags,
        work=work,
        command=shlex.join(["bdlora", *sys.argv[1:]]),
    )
    console = Console()
    with console.status("preparing") as status:
        report = measure_swap(options, status.update)
    print_report(console, report, write_report(report, output))
    if any(note.startswith(INTERRUPTED) for note in report.notes):
        raise typer.Exit(130)
    if report.failures:
        first = report.failures[0]
        raise BDLoRAError(f"found {len(report.failures)} failures, expected none; the first: {first.message}")
