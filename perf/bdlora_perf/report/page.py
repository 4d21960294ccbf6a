"""What the page of a report says, in which order: figures and words, worked out once for all renderers."""

from dataclasses import dataclass

from bdlora_perf.report.plots import Plot, draw_plots
from bdlora_perf.report.results import Point, Results, describe
from bdlora_perf.report.schema import Failure, Report
from bdlora_perf.report.tables import Table, median_tables, run_table, settings_table, speed_up_tables, systems_table

ESTIMATE_LABEL = "Estimate: nothing was measured"


@dataclass(frozen=True)
class Log:
    """A failure: where, why, and the end of the log."""

    title: str
    message: str
    text: str


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    texts: tuple[str, ...]


Block = Table | Plot | Log | Items


@dataclass(frozen=True)
class Section:
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """A whole page; ``label`` is shown as loudly as the title, ``warnings`` right after it."""

    title: str
    label: str
    warnings: tuple[str, ...]
    sections: tuple[Section, ...]

    @property
    def plots(self) -> tuple[Plot, ...]:
        return tuple(block for section in self.sections for block in section.blocks if isinstance(block, Plot))


def make_page(report: Report) -> Page:
    """Everything that report.md and report.html show. Raises `BDLoRAError` for samples that contradict each other."""
    results = Results(report)
    settings = settings_table(results)
    sections = (
        Section("Systems", (systems_table(report),)),
        Section("Plots", tuple(draw_plots(results))),
        Section("Speed-up", tuple(speed_up_tables(results))),
        Section("Estimates" if report.estimate else "Measurements", tuple(median_tables(results))),
        Section("Failures", tuple(_log(report, failure) for failure in report.failures)),
        Section("Notes", (Items(report.notes),) if report.notes else ()),
        Section("Settings and machine", (*([settings] if settings else []), run_table(report))),
    )
    warnings = []
    if not results.points:
        warnings.append("No sample was taken: there is nothing to show.")
    if report.failures:
        count = len(report.failures)
        warnings.append(f"{count} part{'s' * (count > 1)} of the sweep failed: see Failures.")
    return Page(
        report.title,
        ESTIMATE_LABEL if report.estimate else "",
        tuple(warnings),
        tuple(section for section in sections if section.blocks),
    )


def _log(report: Report, failure: Failure) -> Log:
    system = report.systems.get(failure.system)
    label = system.label if system else failure.system
    where = f" at {describe(Point.of(failure.point))}" if failure.point else ""
    return Log(label + where, failure.message, failure.log_tail)
