"""``bdlora perf kernels``: the LoRA kernels on this GPU, side by side with others."""

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
    raw: Annotated[Path | None, typer.Option(help="Report on the raw.json in this folder; measure nothing.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a report in the folder.")] = False,
) -> None:
    """Time the LoRA kernels on the layers of Llama-3.1: ours, SGLang's, FlashInfer's and cuBLAS's."""
    check_output(output, force)

    import torch
    from rich.console import Console

    from bdlora_perf.kernels.results import load_raw, make_report
    from bdlora_perf.report.render import write_report

    if raw is None:
        if not interpret and not torch.cuda.is_available():
            raise BDLoRAError("bdlora perf kernels: found no CUDA GPU, expected one, or --interpret")
        command = [sys.executable, "-m", "bdlora_perf.kernels.measure", "--output", str(output)]
        command += ["--minutes", str(minutes), *(["--interpret"] if interpret else [])]
        # Triton decides when it is imported whether it interprets.
        environment = {**os.environ, "TRITON_INTERPRET": "1"} if interpret else None
        done = subprocess.run(command, env=environment)
        if done.returncode != 0:
            raise BDLoRAError(f"bdlora perf kernels: found exit code {done.returncode} of the measurement, expected 0")
    report = make_report(load_raw(raw or output))
    print_report(Console(), report, write_report(report, output))
