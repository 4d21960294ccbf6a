"""What the commands of ``bdlora perf`` share: options, the model that they serve, and the report that they write."""

import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.model_names import resolve_model

if TYPE_CHECKING:
    from bdlora_perf.report.schema import Report
    from bdlora_perf.report.tables import Table

SYNTHETIC = "synthetic"
_DTYPES = ("float32", "bfloat16", "float16")

ServerFlags = Annotated[
    list[str] | None,
    typer.Argument(metavar="[-- FLAGS...]", help="Flags of bdlora launch, for every server; absolute paths."),
]
Model = Annotated[
    str, typer.Option(help=f"Path, repo id or short name; '{SYNTHETIC}': a random Llama made on the fly.")
]
HiddenSize = Annotated[int, typer.Option(min=1, help="Of the synthetic model.")]
Layers = Annotated[int, typer.Option("--layers", "--num-layers", min=1, help="Of the synthetic model.")]
Systems = Annotated[list[str] | None, typer.Option(help="Systems to start, comma or repeat; default: all.")]
Before = Annotated[
    Path | None, typer.Option(metavar="CHECKOUT", help="Another checkout of this project, to measure beside it.")
]
Dtype = Annotated[str | None, typer.Option(help="Of every server. Default: float32 on a CPU, else bfloat16.")]
Seed = Annotated[int, typer.Option(help="Of the model, the adapters, the prompts and their order.")]
Output = Annotated[Path, typer.Option(help="Folder for the report.")]
Work = Annotated[Path, typer.Option(help="Folder for models, adapters and logs, used again.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a report in the folder.")]


def model_folder(model: str, work: Path, hidden_size: int, layers: int, seed: int) -> str:
    """Folder or repo id of a model; of a random Llama's, servers that are started from now on import no other model.

    Raises:
        BDLoRAError: no such model, the hidden size does not fit the heads, or the model cannot be written.
    """
    if model != SYNTHETIC:
        return resolve_model(model)
    from bdlora_perf.serve.adapters import synthetic_model
    from bdlora_perf.server_process import only_models

    for name, value in only_models("llama").items():
        os.environ.setdefault(name, value)
    return str(synthetic_model(work, hidden_size, layers, seed))


def split(texts: Sequence[str] | None) -> list[str]:
    """The names of an option that takes several, by comma or repeated."""
    return [name.strip() for text in texts or () for name in text.split(",")]


def check_output(folder: Path, force: bool) -> None:
    """Find out before the measurement whether its report can be written, and make the folder.

    Raises:
        BDLoRAError: there is a report already and no ``force``, or the folder cannot be written.
    """
    if (folder / "report.json").exists() and not force:
        raise BDLoRAError(f"--output {folder}: found a report there, expected another folder, or --force to replace it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**20))
    except OSError as error:
        raise BDLoRAError(
            f"--output {folder}: found {error.strerror}, expected a folder that can be written"
        ) from error


def server_dtype(given: str | None, has_gpu: bool) -> str:
    """Of every server that is measured; raises `BDLoRAError` for a type that a base model is not served in."""
    # By default a float32 model is served in float16 on a GPU, and older checkouts do so on a CPU, which is slow at it.
    dtype = given or ("bfloat16" if has_gpu else "float32")
    if dtype not in _DTYPES:
        raise BDLoRAError(f"--dtype: found {dtype!r}, expected {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}")
    return dtype


def flags_beside_others(flags: Sequence[str] | None, has_gpu: bool) -> list[str]:
    """Flags of servers that are up together: on a CPU, SGLang takes what the others have allocated for its own."""
    given = list(flags or ())
    return given if has_gpu or "--mem-fraction-static" in given else ["--mem-fraction-static", "0.9", *given]


def typed_command() -> str:
    """What the user typed, for the report."""
    return shlex.join(["bdlora", *sys.argv[1:]])


def report_on(measure: "Callable[[Callable[[str], None]], Report]", output: Path) -> None:
    """Measure, saying what goes on, then `finish`; ``measure`` gets what it tells that to."""
    console = Console()
    with console.status("preparing") as status:
        report = measure(status.update)
    finish(console, report, output)


def finish(console: Console, report: "Report", output: Path, *, all_must_be_measured: bool = True) -> None:
    """Write and print a report, and end the command with exit code 130 where it was interrupted.

    Raises:
        BDLoRAError: something failed, though all must be measured.
    """
    from bdlora_perf.report.render import write_report
    from bdlora_perf.report.run import was_interrupted

    print_report(console, report, write_report(report, output))
    if was_interrupted(report):
        raise typer.Exit(130)
    if report.failures and all_must_be_measured:
        first = report.failures[0]
        raise BDLoRAError(f"found {len(report.failures)} failures, expected none; the first: {first.message}")


def print_report(console: Console, report: "Report", paths: list[Path]) -> None:
    """The speed-ups by the first metric (its figures where nothing is compared), failures, notes, and the files."""
    from bdlora_perf.report.frame import Results
    from bdlora_perf.report.tables import median_tables, speed_up_tables

    results = Results(report)
    speed_ups = speed_up_tables(results)
    for table in speed_ups[: 2 * len(report.baselines)] or median_tables(results)[:1]:
        print_table(console, table)
    for failure in report.failures:
        console.print(f"{failure.system}: {failure.message}", style="red", markup=False, soft_wrap=True)
        console.print(failure.log_tail, markup=False, highlight=False, soft_wrap=True)
    for note in report.notes:
        console.print(note, style="yellow", markup=False)
    console.print(f"Report: {', '.join(str(path) for path in paths)}", soft_wrap=True)


def print_table(console: Console, table: "Table") -> None:
    from rich.table import Table

    shown = Table(title=table.title, caption=table.caption)
    for i, column in enumerate(table.columns):
        shown.add_column(column, justify="left" if i < table.texts else "right")
    for row in table.rows:
        shown.add_row(*row)
    console.print(shown)
