"""What each kind of report is about, and which plots it has."""

from collections.abc import Mapping

from bdlora_perf.report.plots import Lines, Percentiles, Plotter, SpeedUps, Stack, TradeOff
from bdlora_perf.report.schema import Kind

_Names = tuple[str, ...]

_LOAD = ("concurrency", "request_rate")
_LATENCIES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "itl_ms": "ITL", "e2e_latency_ms": "E2E latency"}
_BREAKDOWN = Stack("breakdown", "Time", "breakdown_")
# What is allocated when a server starts does not depend on the requests.
_MEMORY = Stack("memory", "Memory", "memory_", pooled=(*_LOAD, "input_len", "output_len", "distribution", "phase"))
_KERNEL_PANELS = ("phase", "layer")
_SERVER = ("tp", "dtype")
_BLOCKS = ("LoRA", "BD-LoRA")


class Layout:
    """``headlines`` are the metrics that speed-ups are worked out for, by ``grouped_by``, beside the overall mean.

    A plot whose metrics were not measured is left out; ``panels`` are the dimensions of that of the speed-ups.
    ``paired`` are the metrics whose differences to the baselines are tested, and their means by ``grouped_by``.
    """

    def __init__(
        self, headlines: _Names, grouped_by: _Names, *plots: Plotter, panels: _Names = (), paired: _Names = ()
    ) -> None:
        self.headlines, self.grouped_by, self.paired = headlines, grouped_by, paired
        self.plots = (SpeedUps("speed-up", headlines, grouped_by, panels), *plots)


LAYOUTS: Mapping[Kind, Layout] = {
    "serve": Layout(
        ("output_throughput", "median_ttft_ms", "median_tpot_ms", "median_e2e_latency_ms"),
        _LOAD,
        Lines("throughput", "output_throughput", _LOAD),
        Lines("achieved-rate", "request_throughput", ("request_rate",)),
        Lines("goodput", "request_goodput", _LOAD),
        Percentiles("latency", _LATENCIES),
        _MEMORY,
    ),
    "collectives": Layout(
        ("forward_ms", "time_us"),
        ("operation",),
        Stack("collectives", "Collectives of a forward pass", "collectives_per_forward", part="operation"),
        Lines("time", "time_us", ("bytes",), log_y=True),
        _BREAKDOWN,
    ),
    "kernels": Layout(
        ("time_us",),
        ("phase", "layer"),
        Lines("time", "time_us", ("tokens",), _KERNEL_PANELS, log_y=True),
        Lines("bandwidth", "gb_per_s", ("tokens",), _KERNEL_PANELS),
        Lines("arithmetic", "tflop_per_s", ("tokens",), _KERNEL_PANELS),
        Lines("ceiling", "share_of_ceiling", ("tokens",), _KERNEL_PANELS),
        panels=("model", "tp"),
    ),
    "kernels-static": Layout(
        ("time_us", "serial_us"),
        ("phase", "rank"),
        Lines("time", "time_us", ("tokens",), ("model", "adapters", "rank"), log_y=True),
        Lines("serial", "serial_us", ("tokens",), ("model", "adapters", "rank"), log_y=True),
        Lines("by-rank", "time_us", ("rank",), ("model", "adapters"), log_y=True),
        panels=("model",),
    ),
    "estimate": Layout(("latency_ms", "output_throughput"), ("phase", "concurrency", "rank"), _BREAKDOWN, _MEMORY),
    "engine": Layout(
        ("decode_ms", "prefill_ms"),
        ("tp",),
        Lines("decode", "decode_ms", ("requests",), _SERVER),
        Lines("prefill", "prefill_ms", ("requests",), _SERVER),
        Lines("bandwidth", "decode_bandwidth_gbs", ("requests",), _SERVER),
        panels=("dtype",),
    ),
    "swap": Layout(
        ("gap_ms", "median_load_ms", "median_cold_ms"),
        ("tp",),
        Percentiles("latency", {"load_ms": "Load", "cold_ms": "First token, cold", "warm_ms": "First token, warm"}),
        Lines("gap", "gap_ms", ("rank",), ("tp",), log_y=True),
        Lines("prepare", "prepare_same_us", ("requests",), log_y=True),
    ),
    "quality": Layout(
        (),
        ("task",),
        TradeOff("perplexity", "Perplexity against parameters", "perplexity", _BLOCKS),
        TradeOff("accuracy", "Accuracy against parameters", "accuracy", _BLOCKS),
        TradeOff("token-accuracy", "Accuracy by token against parameters", "token_accuracy", _BLOCKS),
        TradeOff("speed", "Perplexity against speed", "perplexity", _BLOCKS, x="output_throughput"),
        TradeOff("conversion", "What conversion costs", "perplexity", ("LoRA", "conversion")),
        TradeOff("initial-values", "Initial values of a block-diagonal A", "perplexity", (*_BLOCKS, "initial values")),
        paired=("loss", "accuracy", "token_accuracy"),
    ),
    "convert": Layout(
        ("seconds",),
        ("module",),
        Lines("time", "seconds", ("billions_of_parameters",)),
        Lines("rate", "gb_per_s", ("billions_of_parameters",)),
        Lines("memory", "above_mib", ("billions_of_parameters",)),
    ),
}
