"""A whole benchmark: from the options to a report."""

from collections.abc import Callable
from contextlib import closing

from bdlora_perf.report.run import Run
from bdlora_perf.report.schema import Report
from bdlora_perf.serve.adapters import MadeAdapter, matched_adapter
from bdlora_perf.serve.contenders import Contender, Given, Ours
from bdlora_perf.serve.options import Benchmark, ServeOptions
from bdlora_perf.serve.report import make_report
from bdlora_perf.serve.run import SweepRunner, Watcher, schedule
from bdlora_perf.serve.servers import RunningServer, find_target
from bdlora_perf.serve.systems import AdapterShape
from bdlora_perf.serve.vllm import VLLM


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
    state = Benchmark(options)
    watcher.doing("making adapters")
    state.adapters = _make_adapters(options)
    apis = {find_target(server).api for server in running.values()}
    if "vllm" in apis or any(system.engine == "vllm" for system in options.systems):
        state.api = "vllm"  # the one that all of them have
    contenders: dict[str, Contender] = {
        system.name: (VLLM if system.engine == "vllm" else Ours)(state, system) for system in options.systems
    }
    contenders |= {name: Given(server, options.url_adapters) for name, server in running.items()}
    runner = SweepRunner(contenders, options.bounds, options.find_rate, options.seed, watcher, state.runs, state.api)
    batches = schedule(
        options.names, options.workloads, options.rounds, options.keep_servers, options.seed, options.rounds_a_start
    )
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
    for rank in options.ranks:
        own = [shape for system in options.systems if (shape := options.shape(system, rank)) is not None]
        shapes |= dict.fromkeys([*own, AdapterShape(rank, None)] if own else [])
    return {shape: matched_adapter(options.work, str(options.model), shape, options.seed) for shape in shapes}
