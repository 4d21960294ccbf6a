"""What the commands of ``bdlora perf`` share: the model that they serve, and the report that they write."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from bdlora_sglang.errors import BDLoRAError

if TYPE_CHECKING:
    from bdlora_perf.report.schema import Report

SYNTHETIC = "synthetic"


def make_synthetic_model(work: Path, hidden_size: int, layers: int, seed: int) -> str:
    """The folder of a random Llama; servers that are started from now on import no other model.

    Raises:
        BDLoRAError: the hidden size does not fit the heads, or the model cannot be written.
    """
    from bdlora_perf.serve.adapters import synthetic_model
    from bdlora_perf.server_process import only_models

    for name, value in only_models("llama").items():
        os.environ.setdefault(name, value)
    return str(synthetic_model(work, hidden_size, layers, seed))


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


def print_report(console: Console, report: "Report", paths: list[Path]) -> None:
    """The speed-ups by the first metric (its figures where nothing is compared), failures, notes, and the files."""
    from bdlora_perf.report.frame import Results
    from bdlora_perf.report.tables import median_tables, speed_up_tables

    results = Results(report)
    speed_ups = speed_up_tables(results)
    for content in speed_ups[: 2 * len(report.baselines)] or median_tables(results)[:1]:
        table = Table(title=content.title, caption=content.caption)
        for i, column in enumerate(content.columns):
            table.add_column(column, justify="left" if i < content.texts else "right")
        for row in content.rows:
            table.add_row(*row)
        console.print(table)
    for failure in report.failures:
        console.print(f"{failure.system}: {failure.message}", style="red", markup=False, soft_wrap=True)
        console.print(failure.log_tail, markup=False, highlight=False, soft_wrap=True)
    for note in report.notes:
        console.print(note, style="yellow", markup=False)
    console.print(f"Report: {', '.join(str(path) for path in paths)}", soft_wrap=True)
