"""``bdlora perf collectives``: what the ranks send each other in one forward pass."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from bdlora_cli.perf_output import (
    SYNTHETIC,
    Dtype,
    Force,
    HiddenSize,
    Layers,
    Model,
    Output,
    Seed,
    ServerFlags,
    Systems,
    Work,
    check_output,
    model_folder,
    report_on,
    server_dtype,
    split,
    typed_command,
)


def collectives(
    server_flags: ServerFlags = None,
    model: Model = SYNTHETIC,
    hidden_size: HiddenSize = 512,
    layers: Layers = 4,
    tp: Annotated[int, typer.Option(min=2, help="TP degree.")] = 2,
    systems: Systems = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences of the batch, each with an adapter.")] = 8,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 32,
    decode_steps: Annotated[int, typer.Option(min=1, help="Decode forwards of a round.")] = 8,
    rank: Annotated[int, typer.Option(min=1, help="r, the rank of plain LoRA.")] = 16,
    dtype: Dtype = None,
    rounds: Annotated[int, typer.Option(min=1, help="Profiles of each system.")] = 5,
    seed: Seed = 0,
    output: Output = Path("perf-collectives"),
    work: Work = Path(".perf"),
    force: Force = False,
) -> None:
    """Count and weigh the collectives of one forward pass in running servers, and time each size on this machine.

    Counts come from PyTorch's profiler in the servers' own processes, and are compared with the papers' formulas.
    """
    check_output(output, force)

    import torch

    from bdlora_perf.collectives.measure import CollectivesOptions, measure_collectives
    from bdlora_perf.serve.systems import choose_systems

    has_gpu = torch.accelerator.is_available()
    options = CollectivesOptions(
        model=model_folder(model, work, hidden_size, layers, seed),
        systems=choose_systems(split(systems), has_gpu),
        tp=tp,
        batch_size=batch_size,
        input_len=input_len,
        decode_steps=decode_steps,
        rank=rank,
        rounds=rounds,
        seed=seed,
        dtype=server_dtype(dtype, has_gpu),
        server_flags=tuple(server_flags or ()),
        work=work,
        command=typed_command(),
    )
    report_on(partial(measure_collectives, options), output)
