"""Turning a `Report` into a folder: raw figures, ``report.md`` and plots; ``report.html`` where it is asked for."""

import base64
import re
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from bdlora_perf.report.frame import Results, describe
from bdlora_perf.report.kinds import LAYOUTS
from bdlora_perf.report.paired import paired_tables
from bdlora_perf.report.plots import Plot, draw_plots
from bdlora_perf.report.schema import Failure, Report, save_report, write_atomically
from bdlora_perf.report.tables import Table, median_tables, run_table, settings_table, speed_up_tables, systems_table
from bdlora_sglang.errors import BDLoRAError

ESTIMATE_LABEL = "Estimate: nothing was measured"


@dataclass(frozen=True)
class Log:
    """A failure: where, why, and the end of the log."""

    title: str
    message: str
    text: str

    @property
    def fence(self) -> str:
        """Longer than any fence inside."""
        return "`" * max(3, *(len(run) + 1 for run in re.findall("`+", self.text)), 3)


@dataclass(frozen=True)
class Section:
    title: str
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    logs: tuple[Log, ...] = ()
    texts: tuple[str, ...] = ()


def write_report(report: Report, folder: Path, html: bool = False) -> list[Path]:
    """Write report.json, report.md and the plots/*.svg that it shows, and report.html on demand; returns their paths.

    The same report gives the same bytes. The raw figures are written first: they are safe whatever happens to a page.

    Raises:
        BDLoRAError: the folder or a file cannot be written, or the samples contradict each other.
    """
    plots = folder / "plots"
    try:
        plots.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BDLoRAError(f"{plots}: found {error.strerror}, expected to be able to make the folder") from error
    written = [save_report(report, folder)]
    sections = _sections(report)
    files = {plots / f"{plot.name}.svg": plot.svg for section in sections for plot in section.plots}
    for name in ("report.md", "report.html") if html else ("report.md",):
        files[folder / name] = _page(report, sections, f"{name}.j2")
    for path, text in files.items():
        write_atomically(path, text)
    return [*written, *files]


def _sections(report: Report) -> list[Section]:
    results, layout = Results(report), LAYOUTS[report.kind]
    sections = (
        Section("Systems", (systems_table(report),)),
        Section("Plots", plots=tuple(draw_plots(results, layout.plots))),
        Section("Speed-up", tuple(speed_up_tables(results))),
        Section("Paired differences", tuple(paired_tables(results, layout.paired, layout.grouped_by))),
        Section("Estimates" if report.estimate else "Measurements", tuple(median_tables(results))),
        Section("Failures", logs=tuple(_log(report, failure) for failure in report.failures)),
        Section("Notes", texts=report.notes),
        Section("Settings and machine", (settings_table(results), run_table(report))),
    )
    return [section for section in sections if section.tables or section.plots or section.logs or section.texts]


def _log(report: Report, failure: Failure) -> Log:
    system = report.systems.get(failure.system)
    label = system.label if system else failure.system
    where = f" at {describe(failure.point)}" if failure.point else ""
    return Log(label + where, failure.message, failure.log_tail)


def _page(report: Report, sections: list[Section], template: str) -> str:
    warnings = []
    if not report.samples:
        warnings.append("No sample was taken: there is nothing to show.")
    if report.failures:
        count = len(report.failures)
        warnings.append(f"{count} part{'s' * (count > 1)} of the sweep failed: see Failures.")
    environment = Environment(
        loader=PackageLoader("bdlora_perf.report"),
        autoescape=select_autoescape(["html.j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters["md"] = _escape_markdown
    environment.filters["base64"] = lambda text: base64.b64encode(text.encode()).decode()
    label = ESTIMATE_LABEL if report.estimate else ""
    return environment.get_template(template).render(
        title=report.title, label=label, warnings=warnings, sections=sections
    )


def _escape_markdown(text: str) -> str:
    """One line in which no character has a meaning of its own."""
    return re.sub(r"([\\`*_<>|\[\]#~&$])", r"\\\1", " ".join(text.split()))
