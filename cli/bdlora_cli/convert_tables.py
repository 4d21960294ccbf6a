"""What ``bdlora convert`` shows: tables and progress bars."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from bdlora_sglang.convert import (
    AdapterSummary,
    ConversionReport,
    DeltaDifference,
    Job,
    LogprobDifference,
    ModuleReport,
    Outcome,
    Result,
)

_console = Console()
_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("modules"),
    TimeElapsedColumn(),
)


@contextmanager
def one_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar for one adapter."""
    with Progress(*_COLUMNS, console=Console(stderr=True)) as progress:
        task = progress.add_task(escape(name), total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def bars() -> Iterator[Callable[[Job, int, int], None]]:
    """A progress bar for every adapter that is being, or has been, converted."""
    with Progress(*_COLUMNS, console=Console(stderr=True)) as progress:
        tasks: dict[str, TaskID] = {}

        def update(job: Job, done: int, total: int) -> None:
            name = job.source.name
            if name not in tasks:
                tasks[name] = progress.add_task(escape(name), total=total)
            progress.update(tasks[name], completed=done, total=total)

        yield update


def print_report(report: ConversionReport) -> None:
    table = Table("modules", "side", "rank", "parameters", "error", title=escape(str(report.destination)))
    calibrated = report.activation_error is not None
    if calibrated:
        table.add_column("activation error")
    groups: dict[str, list[ModuleReport]] = {}
    for module in report.modules:
        groups.setdefault(module.name.rpartition(".")[2], []).append(module)
    for name, modules in groups.items():
        ranks = sorted({module.rank for module in modules})
        before = sorted({module.source_rank for module in modules})
        row = [
            f"{escape(name)} x {len(modules)}",
            modules[0].side.value,
            f"{_range(before)} -> {_range(ranks)}",
            f"{sum(module.parameters for module in modules):,}",
            _spread([module.error for module in modules]),
        ]
        if calibrated:
            row.append(_spread([m.activation_error for m in modules if m.activation_error is not None]))
        table.add_row(*row)
    _console.print(table)
    _console.print(
        f"{report.parameters:,} parameters, {report.param_ratio:.3f} of the source's; "
        f"relative error of the deltas {report.error:.3e}"
    )
    if report.activation_error is not None:
        _console.print(
            f"on the calibration text's activations {report.activation_error:.3e}; "
            f"without calibration {report.uncalibrated_activation_error:.3e}"
        )
    if report.above_max_error:
        _console.print(
            f"[yellow]{len(report.above_max_error)} modules stay above --max-error {report.max_error}, by the budget "
            f"or by rounding to {str(report.dtype).removeprefix('torch.')}[/yellow]"
        )


def print_results(results: Sequence[Result]) -> None:
    """One line an adapter, the failed ones last, in red."""
    table = Table("adapter", "outcome", "parameters", "of the source's", "error")
    for result in sorted(results, key=lambda result: (result.outcome is Outcome.FAILED, result.job.source.name)):
        name, report = escape(result.job.source.name), result.report
        if report is not None:
            row = (f"{report.parameters:,}", f"{report.param_ratio:.3f}", f"{report.error:.3e}")
            table.add_row(name, result.outcome.value, *row)
        else:
            table.add_row(name, result.outcome.value)
    _console.print(table)
    for result in results:
        if result.outcome is Outcome.FAILED:
            _console.print(f"[red]{escape(result.job.source.name)}: {escape(result.message)}[/red]", soft_wrap=True)


def print_summary(summary: AdapterSummary) -> None:
    _console.print(f"[bold]{escape(str(summary.folder))}[/bold]: {summary.kind}, {summary.nblocks} block(s)")
    _console.print(f"base model  {escape(str(summary.base_model))}")
    _console.print(f"rank        {_range(summary.ranks)} (all blocks together)")
    _console.print(f"parameters  {summary.num_parameters:,} ({', '.join(summary.dtypes)})")
    modules = Table("modules", "TP side", "block-diagonal", "blocks", "rank", "in x out")
    groups: dict[tuple[str, ...], int] = {}
    for module in summary.modules.values():
        leaf = module.name.rpartition(".")[2]
        side = summary.sides[leaf]
        factor = module.side.name if module.side.name != "NONE" else "-"
        shape = f"{module.in_features} x {module.out_features}"
        side_name = "unknown" if side is None else side.value
        row = (escape(leaf), side_name, factor, str(module.nblocks), str(module.rank), shape)
        groups[row] = groups.get(row, 0) + 1
    for (leaf, *rest), count in groups.items():
        modules.add_row(f"{leaf} x {count}", *rest)
    _console.print(modules)
    sizes = Table("TP", "BD-LoRA (no communication)", "replicated LoRA", "S-LoRA", title="bytes per GPU")
    for size in summary.bytes_per_gpu:
        row_ = (size.communication_free, size.replicated, size.fully_sharded)
        sizes.add_row(str(size.tp_size), *(f"{number:,}" for number in row_))
    _console.print(sizes)


def print_differences(differences: Sequence[DeltaDifference]) -> None:
    table = Table("module", "Frobenius", "spectral", title="relative error of the deltas")
    for difference in differences:
        table.add_row(escape(difference.module), f"{difference.frobenius:.3e}", f"{difference.spectral:.3e}")
    _console.print(table)
    worst = max(differences, key=lambda difference: difference.frobenius)
    _console.print(f"{len(differences)} modules, largest error {worst.frobenius:.3e} ({escape(worst.module)})")


def print_logprobs(difference: LogprobDifference) -> None:
    _console.print(
        f"log probabilities over {difference.tokens} tokens: largest difference {difference.largest:.3e} nats, mean KL "
        f"{difference.mean_kl:.3e} nats, same most likely token at {difference.same_argmax:.0%} of positions"
    )


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):.3e}" if min(values) == max(values) else f"{min(values):.3e} to {max(values):.3e}"
