"""``bdlora perf engine``: how long the steps of the engine take."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from bdlora_cli.perf_output import SYNTHETIC, check_output, make_synthetic_model, print_report
from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.model_names import resolve_model

_TP = (1, 2, 4)
_DTYPES = ("float32", "bfloat16")
_REQUESTS = (1, 4, 8, 32)


def engine(
    server_flags: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- FLAGS...]", help="Flags of bdlora launch, for every server; absolute paths."),
    ] = None,
    model: Annotated[
        str, typer.Option(help=f"Path, repo id or short name; '{SYNTHETIC}': a random Llama made on the fly.")
    ] = SYNTHETIC,
    hidden_size: Annotated[int, typer.Option(min=1, help="Of the synthetic model.")] = 1024,
    layers: Annotated[int, typer.Option("--layers", "--num-layers", min=1, help="Of the synthetic model.")] = 4,
    tp: Annotated[list[int] | None, typer.Option(min=1, help="TP degree; repeatable. Default: 1, 2 and 4.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="Of the servers; repeatable. Default: float32 and bfloat16.")
    ] = None,
    requests: Annotated[
        list[int] | None, typer.Option(min=1, help="Requests of a batch; repeatable. Default: 1, 4, 8 and 32.")
    ] = None,
    adapters: Annotated[int, typer.Option(min=1, help="Adapters that take turns in a batch.")] = 8,
    rank: Annotated[int, typer.Option(min=1, help="r, the rank of plain LoRA; BD-LoRA's is 2r.")] = 16,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 64,
    decode_steps: Annotated[int, typer.Option(min=1, help="Decode steps of a batch.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each system at each point.")] = 5,
    before: Annotated[
        Path | None, typer.Option(metavar="CHECKOUT", help="Another checkout of this project, to measure beside it.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the model, the adapters and the prompts.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("perf-engine"),
    work: Annotated[Path, typer.Option(help="Folder for models, adapters and logs, used again.")] = Path(".perf"),
    force: Annotated[bool, typer.Option("--force", help="Replace a report in the folder.")] = False,
) -> None:
    """Time a decode step and a prefill in running servers: base model and BD-LoRA, now and in another checkout.

    A server for each TP degree and dtype, one of each checkout at a time; batches of each number of requests take
    turns. Ctrl-C ends the servers and keeps what is measured.
    """
    check_output(output, force)

    import torch
    from rich.console import Console

    from bdlora_perf.engine.bandwidth import shape_of
    from bdlora_perf.engine.measure import measure_engine
    from bdlora_perf.engine.plan import ITEM_BYTES, LORA, EngineOptions
    from bdlora_perf.engine.report import INTERRUPTED
    from bdlora_perf.report.render import write_report

    tps, dtypes = list(dict.fromkeys(tp or _TP)), list(dict.fromkeys(dtype or _DTYPES))
    for name in dtypes:
        if name not in ITEM_BYTES:
            raise BDLoRAError(f"--dtype: found {name!r}, expected one of {', '.join(ITEM_BYTES)}")
    path = make_synthetic_model(work, hidden_size, layers, seed) if model == SYNTHETIC else resolve_model(model)
    shape = shape_of(path)
    for degree in tps:
        shape.check_tp(degree)
        LORA.adapter(rank, degree)
    flags = list(server_flags or ())
    if not torch.accelerator.is_available() and "--mem-fraction-static" not in flags:
        # SGLang takes what the servers beside it have allocated for its own.
        flags = ["--mem-fraction-static", "0.9", *flags]
    options = EngineOptions(
        model=path,
        shape=shape,
        tps=tps,
        dtypes=dtypes,
        requests=sorted(set(requests or _REQUESTS)),
        adapters=adapters,
        rank=rank,
        input_len=input_len,
        decode_steps=decode_steps,
        rounds=rounds,
        seed=seed,
        before=before,
        server_flags=flags,
        work=work,
        command=shlex.join(["bdlora", *sys.argv[1:]]),
    )
    console = Console()
    with console.status("preparing") as status:
        report = measure_engine(options, status.update)
    print_report(console, report, write_report(report, output))
    if any(note.startswith(INTERRUPTED) for note in report.notes):
        raise typer.Exit(130)
    if report.failures:
        first = report.failures[0]
        raise BDLoRAError(f"found {len(report.failures)} failures, expected none; the first: {first.message}")
