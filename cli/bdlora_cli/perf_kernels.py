"""``bdlora perf kernels``: the LoRA kernels side by side with others, on this GPU or, by a model, on others."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar, get_args

import typer
from rich.console import Console
from rich.progress import Progress

from bdlora_cli.perf_output import check_output, finish, print_report, typed_command
from bdlora_sglang.errors import BDLoRAError

Name = TypeVar("Name", bound=str)


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
        _static(architecture, model, phase, rank, output, force, measured)
        return
    if architecture or model or phase or rank or measured:
        raise BDLoRAError(
            "bdlora perf kernels: found --architecture, --model, --phase, --rank or --measured, expected --static"
        )
    check_output(output, force)

    import torch

    from bdlora_perf.kernels.results import load_raw, make_report

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
    finish(Console(), make_report(load_raw(raw or output)), output, all_must_be_measured=False)


def _static(
    architectures: Sequence[str] | None,
    models: Sequence[str] | None,
    phases: Sequence[str] | None,
    ranks: Sequence[int] | None,
    output: Path,
    force: bool,
    measured: Path | None,
) -> None:
    """Compile, model and report, one folder an architecture."""
    try:
        import sglang  # noqa: F401

        from bdlora_perf.kernels.latency import KNOWN
    except ImportError as error:
        raise BDLoRAError(f"bdlora perf kernels --static: found no {error.name}, expected SGLang and Triton") from error
    from bdlora_perf.kernels.shapes import MODELS, Phase
    from bdlora_perf.kernels.static import RANKS, Row, read_all, sweep
    from bdlora_perf.kernels.static_report import frame_of, make_report, measured_times, write_launches
    from bdlora_perf.report.render import write_report
    from bdlora_perf.report.run import Run
    from bdlora_perf.report.schema import load_report

    known = {f"sm_{capability}": capability for capability in KNOWN}
    chosen = _checked("--architecture", architectures or list(known), list(known))
    models = _checked("--model", models or [name for name in MODELS if name != "tiny"], list(MODELS))
    chosen_phases: list[Phase] = _checked("--phase", phases or get_args(Phase), get_args(Phase))
    ranks = list(dict.fromkeys(ranks or RANKS))
    if not all(1 <= rank <= 256 for rank in ranks):
        raise BDLoRAError(f"--rank: found {ranks}, expected numbers from 1 to 256")
    timed = None if measured is None else load_report(measured)
    if timed is not None and timed.kind != "kernels":
        raise BDLoRAError(f"--measured {measured}: found a report of {timed.kind}, expected one of bdlora perf kernels")
    if timed is None:
        cases = list(sweep(models, chosen_phases, ranks))
    else:
        cases = list(dict.fromkeys(case for _, case in measured_times(timed)))
    if not cases:
        raise BDLoRAError(f"--measured {measured}: found no layer with times, expected one at least")
    for name in chosen:
        check_output(output / name, force)
    console = Console()
    for name in chosen:
        run, folder = Run(typed_command(), 0), output / name
        rows: list[Row] = []
        with Progress(console=console) as progress:
            task = progress.add_task(f"{name}: compiling", total=len(cases))
            for done, found in read_all(cases, known[name]):
                rows += found
                progress.advance(task, done)
        frame = frame_of(rows)
        report = make_report(run, frame, known[name], timed)
        print_report(console, report, [*write_report(report, folder), write_launches(frame, folder)])


def _checked(option: str, values: Sequence[str], known: Sequence[Name]) -> list[Name]:
    for value in values:
        if value not in known:
            raise BDLoRAError(f"{option}: found '{value}', expected one of {', '.join(known)}")
    return [name for name in known if name in values]
