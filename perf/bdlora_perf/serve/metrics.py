"""What is measured, under SGLang's names, and what is taken from its load generator's result."""

from collections.abc import Mapping
from typing import Any

from bdlora_perf.report.schema import Metric

_STATISTICS = ("mean", "median", "p90", "p95", "p99")
_LATENCIES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e_latency": "E2E latency"}

LOAD_METRICS: dict[str, Metric] = {
    "request_throughput": Metric(label="Request throughput", unit="req/s", better="higher"),
    "input_throughput": Metric(label="Input throughput", unit="tok/s", better="higher"),
    "output_throughput": Metric(label="Output throughput", unit="tok/s", better="higher"),
    "request_goodput": Metric(label="Goodput", unit="req/s", better="higher"),
    **{
        f"{statistic}_{latency}_ms": Metric(label=f"{statistic.capitalize()} {label}", unit="ms", better="lower")
        for latency, label in _LATENCIES.items()
        for statistic in _STATISTICS
    },
}
MEMORY_METRICS: dict[str, Metric] = {
    "memory_weights_gib": Metric(label="Weights per GPU", unit="GiB", better="lower"),
    "memory_kv_cache_gib": Metric(label="KV cache per GPU", unit="GiB"),
    "memory_lora_gib": Metric(label="LoRA slots per GPU", unit="GiB", better="lower"),
}


def load_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """The metrics in a result of ``sglang.benchmark.serving``; goodput is there only if bounds were set."""
    return {name: float(result[name]) for name in LOAD_METRICS if name in result}
