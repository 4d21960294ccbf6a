"""``bdlora perf swap``: loading adapters into running servers."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from bdlora_cli.perf_output import (
    SYNTHETIC,
    Before,
    Dtype,
    Force,
    HiddenSize,
    Layers,
    Model,
    Output,
    Seed,
    ServerFlags,
    Work,
    check_output,
    flags_beside_others,
    model_folder,
    report_on,
    server_dtype,
    typed_command,
)


def swap(
    server_flags: ServerFlags = None,
    model: Model = SYNTHETIC,
    hidden_size: HiddenSize = 1024,
    layers: Layers = 16,
    tp: Annotated[list[int] | None, typer.Option(min=1, help="TP degree; repeatable. Default: 1 and 2.")] = None,
    rank: Annotated[
        list[int] | None,
        typer.Option(min=1, help="r of the adapters; BD-LoRA's is 2r. Repeatable. Default: 8 and 64."),
    ] = None,
    loads: Annotated[int, typer.Option(min=1, help="Adapters loaded in a turn, alone and beside a stream.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each system at each point.")] = 3,
    before: Before = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    output: Output = Path("perf-swap"),
    work: Work = Path(".perf"),
    force: Force = False,
) -> None:
    """Time loading adapters, the first token with a cold and a warm one, and gaps in a stream meanwhile.

    A server for each TP degree, one of each checkout at a time, and adapters of each rank. Ctrl-C ends the servers and
    keeps what is measured.
    """
    check_output(output, force)

    import torch

    from bdlora_perf.engine.bandwidth import shape_of
    from bdlora_perf.swap.measure import SwapOptions, measure_swap

    has_gpu = torch.accelerator.is_available()
    path = model_folder(model, work, hidden_size, layers, seed)
    shape = shape_of(path)
    options = SwapOptions(
        model=path,
        vocabulary=shape.vocabulary,
        tps=list(dict.fromkeys(tp or (1, 2))),
        ranks=sorted(set(rank or (8, 64))),
        loads=loads,
        rounds=rounds,
        seed=seed,
        before=before,
        dtype=server_dtype(dtype, has_gpu),
        server_flags=flags_beside_others(server_flags, has_gpu),
        work=work,
        command=typed_command(),
    )
    options.check(shape, options.ranks)
    report_on(partial(measure_swap, options), output)
