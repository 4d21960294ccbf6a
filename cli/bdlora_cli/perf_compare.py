"""``bdlora perf compare``: two reports side by side; exit code 1 for a regression."""

from pathlib import Path
from typing import Annotated

import typer

_COLORS = {"improvement": "green", "regression": "red", "changed": "yellow"}


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="The report to compare with: its folder, or report.json.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The new report.")],
    tolerance: Annotated[float, typer.Option(min=0, help="A relative change of a median up to this is none.")] = 0.05,
    only_changes: Annotated[bool, typer.Option("--only-changes", help="Leave out what did not change.")] = False,
) -> None:
    """Show what changed from A to B beyond the noise of both; exit with 1 when something became worse.

    p-values are adjusted for the number of figures (Benjamini and Hochberg), so that noise alone is no regression.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from bdlora_perf.report.compare import Verdict, compare_reports
    from bdlora_perf.report.schema import load_report
    from bdlora_perf.report.words import format_number

    comparison = compare_reports(load_report(a), load_report(b), tolerance)
    console = Console()
    quiet = (Verdict.SAME, Verdict.UNTESTED) if only_changes else ()
    shown = [change for change in comparison.changes if change.verdict not in quiet]
    for metric in dict.fromkeys(change.metric for change in shown):
        table = Table(title=escape(metric), title_justify="left")
        for column in ("system", "point"):
            table.add_column(column, overflow="fold")
        for column in ("A", "B", "ratio", "p"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        for change in (change for change in shown if change.metric == metric):
            color = _COLORS.get(change.verdict.value, "default")
            table.add_row(
                escape(change.system),
                escape(change.point),
                format_number(change.a),
                format_number(change.b),
                "-" if change.ratio is None else f"{change.ratio:.3f}",
                "-" if change.p_value is None else f"{change.p_value:.3f}",
                f"[{color}]{change.verdict.value}[/{color}]",
            )
        console.print(table)
    for name, missing in (("A", comparison.only_in_a), ("B", comparison.only_in_b)):
        for what in missing:
            console.print(f"only in {name}: {escape(what)}", soft_wrap=True)
    for warning in comparison.warnings:
        console.print(f"[yellow]{escape(warning)}[/yellow]", soft_wrap=True)
    counts = {verdict: sum(change.verdict is verdict for change in comparison.changes) for verdict in Verdict}
    summary = ", ".join(f"{verdict.value} {count}" for verdict, count in counts.items())
    console.print(f"{len(comparison.changes)} figures compared: {summary}")
    if comparison.regressions:
        raise typer.Exit(1)
