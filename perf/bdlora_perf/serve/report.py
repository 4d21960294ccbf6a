"""The report of a sweep."""

from bdlora_perf.report.run import Run
from bdlora_perf.report.schema import Failure, Report, System, Value
from bdlora_perf.serve.load import API_LABELS
from bdlora_perf.serve.metrics import METRICS
from bdlora_perf.serve.options import Benchmark
from bdlora_perf.serve.systems import BASELINES, AdapterShape, ServedSystem


def main_baseline_failures(report: Report) -> list[Failure]:
    """What failed of the system that the others are compared with first."""
    return [failure for failure in report.failures if failure.system in report.baselines[:1]]


def make_report(state: Benchmark, run: Run) -> Report:
    options, samples = state.options, run.samples
    present = {name for sample in samples for name in sample.metrics}
    baselines = tuple(name for name in BASELINES if name in options.names) or (options.names[0],)
    failed = {name: sum(s.metrics["failed_requests"] for s in samples if s.system == name) for name in options.names}
    lossy = [
        f"{name}: {count:.0f} requests failed; throughput counts the others." for name, count in failed.items() if count
    ]
    return Report(
        kind="serve",
        title="Serving with many adapters",
        **run.head(),
        settings=_settings(state),
        systems={
            **{system.name: System(label=system.label, details=_details(state, system)) for system in options.systems},
            **{
                name: System(label=name, details={**state.runs.get(name, {"url": options.urls[name]})})
                for name in options.urls
            },
        },
        metrics={name: metric for name, metric in METRICS.items() if name in present},
        baselines=baselines,
        samples=tuple(samples),
        failures=tuple(run.failures),
        notes=(*run.broken_off(options.num_turns), *lossy),
    )


def _settings(state: Benchmark) -> dict[str, Value]:
    options = state.options
    shortest = min(workload.shortest for workload in options.workloads)
    prompts = sorted({workload.num_prompts for workload in options.workloads})
    zipf = {workload.alpha for workload in options.workloads if workload.distribution == "zipf"}
    started: dict[str, Value] = {}
    if options.systems:
        started = {"model": options.model, "tp": options.tp, "rank r": ", ".join(map(str, options.ranks))}
        if options.one_rank_of > 1:
            started["one rank of"] = f"{options.whole_model} at TP {options.one_rank_of}, without collectives"
        up = f"one at a time, for {options.rounds_a_start} rounds" if options.rounds_a_start > 1 else "one at a time"
        started["servers started here"] = "all up at once" if options.keep_servers else up
    return {
        **started,
        "rounds": options.rounds,
        "order of the systems": "as listed" if options.starts_once else "drawn anew at each point and round",
        "client": f"SGLang's request functions, {API_LABELS[state.api or 'sglang']}",
        "lengths": "fixed" if shortest == 1 else f"uniform from {shortest:g} of the longest",
        "requests per run": ", ".join(map(str, prompts)),
        "bounds (ms)": " ".join(f"{name}:{most:g}" for name, most in options.bounds.items()),
        **({"zipf": f"the i-th adapter gets i ** -{min(zipf):g} of the first one's requests"} if zipf else {}),
    }


def _details(state: Benchmark, system: ServedSystem) -> dict[str, Value]:
    options = state.options
    details: dict[str, Value] = {**state.runs.get(system.name, {})}
    if options.has_gpu:
        details["kernels for LoRA a layer"] = system.launches
    left_out = ", left out here" if options.one_rank_of > 1 and system.collectives != "none" else ""
    details["collectives for LoRA a layer"] = f"{system.collectives}{left_out}" if options.num_ranks > 1 else "none"
    details["flags"] = " ".join(system.flags if system.engine == "vllm" else [*options.common_flags, *system.flags])
    if options.server_flags and system.engine == "bdlora":
        details["flags"] = f"{details['flags']} {' '.join(options.server_flags)}"
    for r in options.ranks:
        if (made := state.adapter(system, r)) is not None:
            plain = state.adapters[AdapterShape(r, None)]
            details |= {
                f"r={r}: rank": made.shape.rank,
                f"r={r}: blocks": made.shape.nblocks or 1,
                f"r={r}: parameters": made.parameters,
                f"r={r}: parameters over LoRA's": round(made.parameters / plain.parameters, 3),
                f"r={r}: bytes": made.num_bytes,
            }
    return details
