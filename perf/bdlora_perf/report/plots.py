"""Which plots a report has: a table by kind of report. A plot whose metrics were not measured is left out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bdlora_perf.report.bar_plots import Operations, Parts, Percentiles, SpeedUps
from bdlora_perf.report.line_plots import Lines
from bdlora_perf.report.plot_style import plot_settings, system_styles, to_svg
from bdlora_perf.report.results import Results
from bdlora_perf.report.schema import Kind

_BREAKDOWN = Parts("breakdown", "Time", "breakdown_")
_LOAD = ("concurrency", "request_rate")
# What is allocated when a server starts does not depend on the requests.
_MEMORY = Parts("memory", "Memory", "memory_", pooled=(*_LOAD, "input_len", "output_len", "distribution"))
_LATENCIES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "itl_ms": "ITL", "e2e_latency_ms": "E2E latency"}
_KERNEL_PANELS = ("phase", "layer")
_SERVER = ("tp", "dtype")

PLOTS: Mapping[Kind, Sequence[Lines | Percentiles | SpeedUps | Parts | Operations]] = {
    "serve": (
        SpeedUps("speed-up"),
        Lines("throughput", "output_throughput", _LOAD),
        Lines("goodput", "request_goodput", _LOAD),
        Percentiles("latency", _LATENCIES),
        _BREAKDOWN,
        _MEMORY,
    ),
    "collectives": (
        Operations("collectives", "Collectives of a forward pass", ("collectives_per_forward", "bytes_per_forward")),
        Lines("time", "time_us", ("bytes",), log_y=True),
        SpeedUps("speed-up"),
        _BREAKDOWN,
        _MEMORY,
    ),
    "kernels": (
        SpeedUps("speed-up", panels=("model", "tp")),
        Lines("time", "time_us", ("tokens",), _KERNEL_PANELS, log_y=True),
        Lines("bandwidth", "gb_per_s", ("tokens",), _KERNEL_PANELS),
        Lines("arithmetic", "tflop_per_s", ("tokens",), _KERNEL_PANELS),
        Lines("ceiling", "share_of_ceiling", ("tokens",), _KERNEL_PANELS),
        _BREAKDOWN,
        _MEMORY,
    ),
    "estimate": (
        SpeedUps("speed-up"),
        _BREAKDOWN,
        Parts("memory", "Memory", "memory_", pooled=("phase",)),
        Lines("throughput", "output_throughput", _LOAD),
    ),
    "engine": (
        SpeedUps("speed-up", panels=("dtype",)),
        Lines("decode", "decode_ms", ("requests",), _SERVER),
        Lines("prefill", "prefill_ms", ("requests",), _SERVER),
        Lines("bandwidth", "decode_bandwidth_gbs", ("requests",), _SERVER),
    ),
}


@dataclass(frozen=True)
class Plot:
    """One drawn plot: ``svg`` is an element to put on a page."""

    name: str
    title: str
    caption: str
    svg: str


def draw_plots(results: Results) -> list[Plot]:
    """All plots that the report's kind has and that its samples allow."""
    styles = system_styles(results.report)
    plots = []
    for drawer in PLOTS[results.report.kind]:
        with plot_settings(drawer.name):
            drawing = drawer.draw(results, styles)
            if drawing is not None:
                svg = to_svg(drawing.figure, drawer.name)
                plots.append(Plot(drawer.name, drawing.title, drawing.caption, svg))
    return plots
