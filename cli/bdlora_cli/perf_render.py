"""``bdlora perf render``: the pages of a saved report."""

from pathlib import Path
from typing import Annotated

import typer


def render(
    report: Annotated[Path, typer.Argument(metavar="REPORT", help="The report: its folder, or report.json.")],
    output: Annotated[Path | None, typer.Option(help="Folder for the pages; by default that of the report.")] = None,
) -> None:
    """Draw report.md, report.html (a single file) and the plots of a saved report again; nothing is measured."""
    from bdlora_perf.report.render import write_report
    from bdlora_perf.report.schema import load_report

    folder = output or (report if report.is_dir() else report.parent)
    for path in write_report(load_report(report), folder, html=True):
        typer.echo(path)
