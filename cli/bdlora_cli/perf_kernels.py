"""``bdlora perf kernels``: the LoRA kernels side by side with others, on this GPU or, by a model, on others."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from bdlora_cli.perf_output import check_output, print_report
from bdlora_sglang.errors import BDLoRAError


def kernels(
    output: Annotated[Path, typer.Option(help="Folder for the report and the raw figures.")] = Path("perf-kernels"),
    minutes: Annotated[float, typer.Option(min=0.1, help="No case starts later; the most telling come first.")] = 8,
    interpret: Annotated[
        bool, typer.Option("--interpret", help="Without a GPU: check tiny cases in Triton's interpreter.")
    ] = False,
    static: Annotated[
        bool, typer.Option("--static", help="Without a GPU: compile, and put times by a model beside the figures.")
    ] = False,
    architecture: Annotated[
        list[str] | None, typer.Option(help="With --static: sm_80, sm_90 or sm_100; repeatable. Default: all.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="With --static: Llama-3.1-70B or Llama-3.1-8B, at TP 8; repeatable.")
    ] = None,
    phase: Annotated[list[str] | None, typer.Option(help="With --static: decode or prefill; repeatable.")] = None,
    rank: Annotated[
        list[int] | None, typer.Option(help="With --static: local ranks; repeatable. Default: 2 to 64.")
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(help="With --static: a GPU's report, whose cases the model is set against.")
    ] = None,
    raw: Annotated[Path | None, typer.Option(help="Report on the raw.json in this folder; measure nothing.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a report in the folder.")] = False,
) -> None:
    """Time the LoRA kernels on the layers of Llama-3.1: ours, SGLang's, FlashInfer's and cuBLAS's."""
    if static:
        from bdlora_cli.perf_kernels_static import static as run_static

        run_static(architecture or (), model or (), phase or (), rank or (), output, force, measured)
        return
    if architecture or model or phase or rank or measured:
        raise BDLoRAError(
            "bdlora perf kernels: found --architecture, --model, --phase, --rank or --measured, expected --static"
        )
    check_output(output, force)

    import torch
    from rich.console import Console

    from bdlora_perf.kernels.results import load_raw, make_report
    from bdlora_perf.report.render import write_report

    if raw is None:
        if not interpret and not torch.cuda.is_available():
            raise BDLoRAError("bdlora perf kernels: found no CUDA GPU, expected one, --static or --interpret")
        command = [sys.executable, "-m", "bdlora_perf.kernels.measure", "--output", str(output)]
        command += ["--minutes", str(minutes), *(["--interpret"] if interpret else [])]
        # Triton decides when it is imported whether it interprets.
        environment = {**os.environ, "TRITON_INTERPRET": "1"} if interpret else None
        done = subprocess.run(command, env=environment)
        if done.returncode != 0:
            raise BDLoRAError(f"bdlora perf kernels: found exit code {done.returncode} of the measurement, expected 0")
    report = make_report(load_raw(raw or output))
    print_report(Console(), report, write_report(report, output))
