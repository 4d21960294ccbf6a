"""What is measured, under SGLang's names, worked out from the requests of one run."""

from collections.abc import Mapping, Sequence

import numpy as np

from bdlora_perf.report.schema import Metric
from bdlora_perf.serve.load import Outcome

_QUANTILES = {"median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
_LATENCIES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e_latency": "E2E latency"}
# A percentile of fewer figures than this is one of the largest of them.
_FEWEST_BY_ADAPTER = 20

METRICS: dict[str, Metric] = {
    "output_throughput": Metric(label="Output throughput", unit="tok/s", better="higher"),
    "input_throughput": Metric(label="Input throughput", unit="tok/s", better="higher"),
    "request_throughput": Metric(label="Achieved rate", unit="req/s", better="higher"),
    "offered_rate": Metric(label="Offered rate", unit="req/s"),
    "rate_within_slo": Metric(label="Highest rate within the bounds", unit="req/s", better="higher"),
    "request_goodput": Metric(label="Goodput", unit="req/s", better="higher"),
    "slo_attainment": Metric(label="Requests within the bounds", unit="", better="higher"),
    "failed_requests": Metric(label="Failed requests", unit="", better="lower"),
    "average_concurrency": Metric(label="Requests in flight, mean", unit=""),
    **{
        f"{statistic}_{latency}_ms": Metric(label=f"{statistic.capitalize()} {label}", unit="ms", better="lower")
        for latency, label in _LATENCIES.items()
        for statistic in ("mean", *_QUANTILES)
    },
    "worst_adapter_p99_e2e_latency_ms": Metric(label="P99 E2E latency of the worst adapter", unit="ms", better="lower"),
    "fairness": Metric(label="Fairness over adapters (Jain's index of mean latency a token)", unit="", better="higher"),
    "memory_weights_gib": Metric(label="Weights per GPU", unit="GiB", better="lower"),
    "memory_kv_cache_gib": Metric(label="KV cache per GPU", unit="GiB"),
    "memory_lora_gib": Metric(label="LoRA slots per GPU", unit="GiB", better="lower"),
    "adapter_slot_mib": Metric(label="One LoRA slot per GPU", unit="MiB", better="lower"),
}


def run_metrics(
    outcomes: Sequence[Outcome], offered_rate: float | None, bounds: Mapping[str, float]
) -> dict[str, float]:
    """The figures of one run.

    Throughput counts what succeeded, from the first request sent to the last answer. A percentile is there only where
    one request at least is expected beyond it: p99 takes a hundred.

    Args:
        bounds: milliseconds, by ttft, tpot or e2el; a failed request is not within them.
    """
    done = [outcome for outcome in outcomes if not outcome.error]
    metrics: dict[str, float] = {"failed_requests": len(outcomes) - len(done)}
    if offered_rate is not None:
        metrics["offered_rate"] = offered_rate
    if not done:
        return metrics
    seconds = max(o.start + o.latency for o in done) - min(o.start for o in outcomes)
    metrics["output_throughput"] = sum(o.output_len for o in done) / seconds
    metrics["input_throughput"] = sum(o.prompt_len for o in done) / seconds
    metrics["request_throughput"] = len(done) / seconds
    metrics["average_concurrency"] = sum(o.latency for o in done) / seconds
    if bounds:
        good = sum(all(_milliseconds(outcome)[name] <= most for name, most in bounds.items()) for outcome in done)
        metrics |= {"request_goodput": good / seconds, "slo_attainment": good / len(outcomes)}
    latencies = {
        "ttft": [o.ttft for o in done],
        "tpot": [_tpot(o) for o in done if o.output_len > 1],
        "itl": [gap for o in done for gap in o.itl],
        "e2e_latency": [o.latency for o in done],
    }
    for name, values in latencies.items():
        metrics |= _statistics(name, values, len(done))
    return metrics | _by_adapter(done)


def _tpot(outcome: Outcome) -> float:
    return (outcome.latency - outcome.ttft) / (outcome.output_len - 1) if outcome.output_len > 1 else 0.0


def _milliseconds(outcome: Outcome) -> dict[str, float]:
    return {"ttft": 1000 * outcome.ttft, "tpot": 1000 * _tpot(outcome), "e2el": 1000 * outcome.latency}


def _statistics(name: str, values: Sequence[float], requests: int) -> dict[str, float]:
    if not values:
        return {}
    found = {f"mean_{name}_ms": 1000 * float(np.mean(values))}
    for label, quantile in _QUANTILES.items():
        if label == "median" or requests * (1 - quantile) > 1 - 1e-9:
            found[f"{label}_{name}_ms"] = 1000 * float(np.quantile(values, quantile))
    return found


def _by_adapter(done: Sequence[Outcome]) -> dict[str, float]:
    """Over the adapters that were asked for often enough."""
    own: dict[str, list[Outcome]] = {}
    for outcome in done:
        if outcome.adapter is not None:
            own.setdefault(outcome.adapter, []).append(outcome)
    often = [found for found in own.values() if len(found) >= _FEWEST_BY_ADAPTER]
    if len(often) < 2:
        return {}
    worst = max(float(np.quantile([o.latency for o in found], 0.99)) for found in often)
    means = np.array([np.mean([o.latency / max(1, o.output_len) for o in found]) for found in often])
    fairness = float(means.sum() ** 2 / (len(means) * (means**2).sum()))
    return {"worst_adapter_p99_e2e_latency_ms": 1000 * worst, "fairness": fairness}
