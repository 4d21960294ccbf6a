"""Turning a `Report` into a folder: the raw figures, the pages and the plots."""

from pathlib import Path

from bdlora_perf.report.html import render_html
from bdlora_perf.report.markdown import render_markdown
from bdlora_perf.report.page import make_page
from bdlora_perf.report.plot_style import standalone_svg
from bdlora_perf.report.schema import Report, save_report, write_atomically
from bdlora_sglang.errors import BDLoRAError


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write report.json, report.html, report.md and the plots/*.svg that it shows; returns what was written.

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
    page = make_page(report)
    files = {plots / f"{plot.name}.svg": standalone_svg(plot.svg) for plot in page.plots}
    files |= {folder / "report.md": render_markdown(page), folder / "report.html": render_html(page)}
    for path, text in files.items():
        write_atomically(path, text)
    return [*written, *files]
