"""``bdlora perf kernels --static``: the kernels' machine code and a latency model, for GPUs that are not there."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from bdlora_cli.perf_output import check_output, print_report
from bdlora_sglang.errors import BDLoRAError


def static(
    architectures: Sequence[str],
    models: Sequence[str],
    phases: Sequence[str],
    ranks: Sequence[int],
    output: Path,
    force: bool,
    measured: Path | None,
) -> None:
    """Compile, model and report, one folder an architecture.

    Raises:
        BDLoRAError: an option that is not known, no SGLang or no Triton, or a folder that has a report.
    """
    from bdlora_perf.kernels.latency import KNOWN
    from bdlora_perf.kernels.shapes import MODELS, Phase
    from bdlora_perf.kernels.static import RANKS, Row, read_all, sweep
    from bdlora_perf.kernels.static_report import against_measurement, make_report, measured_cases, write_launches
    from bdlora_perf.report.render import write_report
    from bdlora_perf.report.run import Run
    from bdlora_perf.report.schema import load_report

    known = [f"sm_{capability}" for capability in KNOWN]
    chosen = _checked("--architecture", architectures or known, known)
    models = _checked("--model", models or [name for name in MODELS if name != "tiny"], list(MODELS))
    every_phase: tuple[Phase, ...] = ("decode", "prefill")
    named = _checked("--phase", phases or every_phase, every_phase)
    chosen_phases = [phase for phase in every_phase if phase in named]
    ranks = list(ranks) or list(RANKS)
    if not all(1 <= rank <= 256 for rank in ranks):
        raise BDLoRAError(f"--rank: found {ranks}, expected numbers from 1 to 256")
    try:
        import sglang  # noqa: F401
        import triton  # type: ignore[import-untyped, unused-ignore]  # noqa: F401
    except ImportError as error:
        raise BDLoRAError(f"bdlora perf kernels --static: found no {error.name}, expected SGLang and Triton") from error
    timed = None if measured is None else load_report(measured)
    if timed is not None and timed.kind != "kernels":
        raise BDLoRAError(f"--measured {measured}: found a report of {timed.kind}, expected one of bdlora perf kernels")
    folders = {name: output / name for name in chosen}
    for folder in folders.values():
        check_output(folder, force)
    console = Console()
    for name, folder in folders.items():
        run, capability = Run(shlex.join(["bdlora", *sys.argv[1:]]), 0), int(re.sub(r"\D", "", name))
        cases = list(sweep(models, chosen_phases, ranks)) if timed is None else measured_cases(timed)
        rows: list[Row] = []
        with Progress(console=console) as progress:
            task = progress.add_task(f"{name}: compiling", total=len(cases))
            for done, found in read_all(cases, capability):
                rows += found
                progress.advance(task, done)
        if timed is None:
            report = make_report(run, rows, capability)
        else:
            report = against_measurement(run, rows, capability, timed)
        print_report(console, report, [*write_report(report, folder), write_launches(rows, folder)])


def _checked(option: str, values: Sequence[str], known: Sequence[str]) -> list[str]:
    for value in values:
        if value not in known:
            raise BDLoRAError(f"{option}: found '{value}', expected one of {', '.join(known)}")
    return [name for name in known if name in values]
