"""Turning a `Report` into a folder: raw figures, ``report.md`` and plots; ``report.html`` where it is asked for."""

import base64
import re
from collections.abc import Iterable
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template, select_autoescape
from markdown_it import MarkdownIt

from bdlora_perf.report import tables
from bdlora_perf.report.drawing import Plot
from bdlora_perf.report.frame import Results
from bdlora_perf.report.kinds import LAYOUTS
from bdlora_perf.report.plots import draw_plots
from bdlora_perf.report.schema import Failure, Report, save_report, write_atomically
from bdlora_perf.report.words import describe
from bdlora_sglang.errors import BDLoRAError

ESTIMATE_LABEL = "Estimate: nothing was measured"


def write_report(report: Report, folder: Path, html: bool = False) -> list[Path]:
    """Write report.json, report.md and the plots/*.svg that it shows, and report.html on demand; returns their paths.

    The same report gives the same bytes. The raw figures are written first: they are safe whatever happens to a page.

    Raises:
        BDLoRAError: the folder or a file cannot be written, or the samples contradict each other.
    """
    images = folder / "plots"
    try:
        images.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BDLoRAError(f"{images}: found {error.strerror}, expected to be able to make the folder") from error
    written = [save_report(report, folder)]
    results = Results(report)
    plots = draw_plots(results, LAYOUTS[report.kind].plots)
    page = _template("report.md.j2").render(
        report=report,
        estimate_label=ESTIMATE_LABEL,
        systems=[tables.systems_table(report)],
        plots=plots,
        speed_ups=tables.speed_up_tables(results),
        paired=tables.paired_tables(results),
        medians=tables.median_tables(results),
        failures=[(_where(report, failure), failure) for failure in report.failures],
        settings=[tables.settings_table(results), tables.run_table(report)],
    )
    files = {f"plots/{plot.name}.svg": plot.svg for plot in plots} | {"report.md": page}
    if html:
        files["report.html"] = _html(report.title, page, plots)
    for name, text in files.items():
        written.append(folder / name)
        write_atomically(written[-1], text)
    return written


def _where(report: Report, failure: Failure) -> str:
    system = report.systems.get(failure.system)
    label = system.label if system else failure.system
    return f"{label} at {describe(failure.point)}" if failure.point else label


def _html(title: str, markdown: str, plots: Iterable[Plot]) -> str:
    """The same page as a single file; what may be wide scrolls by itself."""
    body = MarkdownIt("commonmark").enable("table").render(markdown).replace("<pre>", '<pre tabindex="0">')
    wide = re.compile("<p>(<img [^>]*>)</p>|(<table>.*?</table>)", re.DOTALL)
    body = wide.sub(r'<div class="scroll" tabindex="0">\1\2</div>', body)
    for plot in plots:
        data = base64.b64encode(plot.svg.encode()).decode()
        body = body.replace(f'"plots/{plot.name}.svg"', f'"data:image/svg+xml;base64,{data}"')
    return _template("report.html.j2").render(title=title, body=body)


def _template(name: str) -> Template:
    environment = Environment(
        loader=PackageLoader("bdlora_perf.report"),
        autoescape=select_autoescape(["html.j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters["md"] = _escape_markdown
    environment.filters["fence"] = _fence
    return environment.get_template(name)


def _escape_markdown(text: str) -> str:
    """One line in which no character has a meaning of its own."""
    return re.sub(r"([\\`*_<>|\[\]#~&$])", r"\\\1", " ".join(text.split()))


def _fence(text: str) -> str:
    """Longer than any fence inside."""
    return "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
