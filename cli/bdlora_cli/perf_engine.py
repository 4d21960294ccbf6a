"""``bdlora perf engine``: how long the steps of the engine take."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from bdlora_cli.perf_output import (
    SYNTHETIC,
    Before,
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
    typed_command,
)
from bdlora_sglang.errors import BDLoRAError


def engine(
    server_flags: ServerFlags = None,
    model: Model = SYNTHETIC,
    hidden_size: HiddenSize = 1024,
    layers: Layers = 4,
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
    before: Before = None,
    seed: Seed = 0,
    output: Output = Path("perf-engine"),
    work: Work = Path(".perf"),
    force: Force = False,
) -> None:
    """Time a decode step and a prefill in running servers: base model and BD-LoRA, now and in another checkout.

    A server for each TP degree and dtype, one of each checkout at a time; batches of each number of requests take
    turns. Ctrl-C ends the servers and keeps what is measured.
    """
    check_output(output, force)

    import torch

    from bdlora_perf.engine.bandwidth import ITEM_BYTES, shape_of
    from bdlora_perf.engine.measure import measure_engine
    from bdlora_perf.engine.plan import EngineOptions

    dtypes = list(dict.fromkeys(dtype or ("float32", "bfloat16")))
    for name in dtypes:
        if name not in ITEM_BYTES:
            raise BDLoRAError(f"--dtype: found {name!r}, expected one of {', '.join(ITEM_BYTES)}")
    path = model_folder(model, work, hidden_size, layers, seed)
    options = EngineOptions(
        model=path,
        shape=shape_of(path),
        tps=list(dict.fromkeys(tp or (1, 2, 4))),
        dtypes=dtypes,
        requests=sorted(set(requests or (1, 4, 8, 32))),
        adapters=adapters,
        rank=rank,
        input_len=input_len,
        decode_steps=decode_steps,
        rounds=rounds,
        seed=seed,
        before=before,
        server_flags=flags_beside_others(server_flags, torch.accelerator.is_available()),
        work=work,
        command=typed_command(),
    )
    options.check(options.shape, [rank])
    report_on(partial(measure_engine, options), output)
