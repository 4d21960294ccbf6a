"""A whole benchmark: from the options to a report."""

from collections.abc import Callable
from contextlib import closing

from bdlora_perf.engine.bandwidth import shape_of
from bdlora_perf.report.run import Run
from bdlora_perf.report.schema import Report, Value
from bdlora_perf.serve.adapters import MadeAdapter, adapter_names_of, matched_adapter
from bdlora_perf.serve.options import Benchmark, ServeOptions
from bdlora_perf.serve.report import make_report
from bdlora_perf.serve.run import Contender, Ready, SweepRunner, Watcher, schedule
from bdlora_perf.serve.servers import (
    RunningServer,
    Server,
    adapter_names,
    find_target,
    make_folder,
    memory_metrics,
    server_info,
    start_server,
    what_runs,
)
from bdlora_perf.serve.systems import AdapterShape, ServedSystem
from bdlora_perf.serve.vllm import VLLM
from bdlora_perf.serve.workload import Workload
from bdlora_sglang.errors import BDLoRAError


def run_benchmark(
    options: ServeOptions,
    watcher: Watcher,
    before: Report | None = None,
    save: Callable[[Report], object] = lambda report: None,
) -> Report:
    """Measure, and return all there is to report; Ctrl-C and SIGTERM end the servers and keep what is measured.

    Args:
        before: a report of the same sweep that was interrupted; its turns are not run again.
        save: is given the report so far after each turn.

    Raises:
        BDLoRAError: adapters cannot be made, a running server does not answer, servers differ in what must be equal, or
            there is no run to report.
    """
    run = Run(options.command, options.seed)
    running = {name: RunningServer(name, url) for name, url in options.urls.items()}
    for server in running.values():
        server.wait_until_healthy()
    state = Benchmark(options, watcher)
    watcher.doing("making adapters")
    state.adapters = _make_adapters(options)
    apis = {find_target(server).api for server in running.values()}
    if "vllm" in apis or any(system.engine == "vllm" for system in options.systems):
        state.api = "vllm"  # the one that all of them have
    contenders = {system.name: _started(state, system) for system in options.systems}
    contenders |= {name: _given(state, server) for name, server in running.items()}
    batches = schedule(
        options.names, options.workloads, options.rounds, options.keep_servers, options.seed, options.rounds_a_start
    )
    runner = SweepRunner(contenders, options.bounds, options.find_rate, options.seed, watcher, state.runs)
    run.samples += before.samples if before else ()
    done = {(sample.system, sample.round, frozenset(sample.point.items())) for sample in run.samples}
    with run.kept_when_interrupted(), closing(runner.run(batches, done)) as records:
        run.interrupted = True  # as long as it is not over
        for record in records:
            run.add(record)
            save(make_report(state, run))
        run.interrupted = False
    return make_report(state, run)


def _make_adapters(options: ServeOptions) -> dict[AdapterShape, MadeAdapter]:
    """All that the systems serve, and plain LoRA's, which the sizes of the others are compared with."""
    shapes: dict[AdapterShape, None] = {}
    for rank in dict.fromkeys(workload.rank for workload in options.workloads):
        own = [shape for system in options.systems if (shape := options.shape(system, rank)) is not None]
        shapes |= dict.fromkeys([*own, AdapterShape(rank, None)] if own else [])
    return {shape: matched_adapter(options.work, str(options.model), shape, options.seed) for shape in shapes}


def _started(state: Benchmark, system: ServedSystem) -> Contender:
    options = state.options
    logs = make_folder(options.work / "logs")
    peer = _vllm(options) if system.engine == "vllm" else None

    def start(count: int, slots: int, rank: int) -> Server:
        name, shape = f"{system.name}-a{count}-s{slots}-r{rank}", options.shape(system, rank)
        made = None if shape is None else state.adapters[shape]
        names = adapter_names_of(count)
        if peer is not None:
            return peer.start(name, system.flags, made.folder if made else None, rank, names, slots, logs)
        flags = [*options.common_flags, *system.flags]
        if made is not None:
            flags += [word for each in names for word in ("--adapters", f"{each}={made.folder}")]
            flags += ["--max-loras-per-batch", str(slots)]
        return start_server(name, [*flags, *options.server_flags], logs)

    def inspect(server: Server, workload: Workload) -> Ready:
        log = "\n".join(server.log_lines())
        target, names = find_target(server, state.api), adapter_names(server)
        if peer is not None:
            return Ready(server, target, names, peer.what_runs(log, workload.slots if names else None), {})
        info = server_info(server)
        return Ready(server, target, names, what_runs(info, log), memory_metrics(info, log))

    return Contender(start, inspect)


def _vllm(options: ServeOptions) -> VLLM:
    if options.vllm_environment is None:
        raise BDLoRAError("--start vllm: found no --vllm-environment, expected the folder of one with vLLM in it")
    longest = max(workload.kv_tokens // (workload.concurrency or 256) for workload in options.workloads)
    peer = VLLM(
        options.vllm_environment,
        str(options.model),
        options.tp,
        options.dtype,
        options.kv_cache,
        # float32 is twice what the shape counts.
        2 * options.kv_cache * shape_of(str(options.model)).kv_bytes_per_token(options.tp),
        options.max_requests,
        longest + 1,
        options.has_gpu,
    )
    peer.check()
    return peer


def _given(state: Benchmark, server: RunningServer) -> Contender:
    def inspect(running: Server, workload: Workload) -> Ready:
        target = find_target(running, state.api)
        names = list(state.options.url_adapters) or adapter_names(running)
        # What else is set there is not known.
        runs: dict[str, Value] = {"url": running.url, "model": target.model, "adapters": len(names)}
        return Ready(running, target, names, runs, {})

    return Contender(lambda count, slots, rank: server, inspect, ours=False)
