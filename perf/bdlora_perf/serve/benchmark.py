"""A whole benchmark: from the options to a report."""

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from bdlora_perf.report.machine import describe_machine
from bdlora_perf.report.schema import Failure, Report, Sample, System, Value
from bdlora_perf.serve.adapters import MadeAdapter, adapter_flags, matched_adapter
from bdlora_perf.serve.load import LoadGenerator
from bdlora_perf.serve.metrics import LOAD_METRICS, MEMORY_METRICS
from bdlora_perf.serve.servers import RunningServer, Server, StartServer, make_folder, start_server
from bdlora_perf.serve.sweep import SweepRunner, Watcher, schedule
from bdlora_perf.serve.systems import BASELINES, AdapterShape, ServedSystem
from bdlora_perf.serve.workload import SKEW_ALPHA, Workload
from bdlora_perf.server_process import terminated_as_interrupted
from bdlora_sglang.errors import BDLoRAError


@dataclass(frozen=True)
class ServeOptions:
    """What to measure.

    Attributes:
        model: folder or repo id of the base model; None only where all servers run already.
        tp: TP degree of the servers.
        systems: those to be started here.
        urls: running servers by the name that the report gives them.
        workloads: the points, those of one deployment side by side.
        rounds: how often each point is measured on each system.
        goodput: bounds as SGLang's ``--goodput`` takes them.
        keep_servers: all servers are up at once, else one at a time.
        server_flags: of ``bdlora launch``, for every server that is started.
        work: folder for adapters and logs.
        command: what the user typed, for the report.
    """

    model: str | None
    tp: int
    systems: Sequence[ServedSystem]
    urls: Mapping[str, str]
    workloads: Sequence[Workload]
    rounds: int
    goodput: Sequence[str]
    keep_servers: bool
    server_flags: Sequence[str]
    seed: int
    work: Path
    command: str

    @property
    def num_turns(self) -> int:
        return len(self.workloads) * self.rounds * (len(self.systems) + len(self.urls))


def run_benchmark(options: ServeOptions, watcher: Watcher) -> Report:
    """Measure, and return all there is to report; Ctrl-C and SIGTERM end the servers and keep what is measured.

    Raises:
        BDLoRAError: adapters cannot be made, a running server does not answer, or there is no run to report.
    """
    started, clock = datetime.now(timezone.utc), time.monotonic()
    running = {name: RunningServer(name, url) for name, url in options.urls.items()}
    for server in running.values():
        server.wait_until_healthy()
    logs = make_folder(options.work / "logs")
    generator = LoadGenerator(logs)
    generator.prepare()
    watcher.doing("making adapters")
    adapters = _make_adapters(options)
    start: dict[str, StartServer] = {
        system.name: _starter(options, system, adapters, logs) for system in options.systems
    }
    start |= {name: _given(server) for name, server in running.items()}
    batches = schedule(list(start), options.workloads, options.rounds, options.keep_servers)
    runner = SweepRunner(start, generator, options.tp, options.model, options.goodput, options.seed, watcher)
    records: list[Sample | Failure] = []
    notes: list[str] = []
    try:
        with terminated_as_interrupted(), closing(runner.run(batches)) as runs:
            records.extend(runs)
    except KeyboardInterrupt:
        notes.append(f"Interrupted: {len(records)} of {options.num_turns} runs are in this report.")
    samples = tuple(record for record in records if isinstance(record, Sample))
    failures = tuple(record for record in records if isinstance(record, Failure))
    if not samples:
        reasons = [*notes, *(f"{f.system}: {f.message}\n{f.log_tail}" for f in failures)]
        raise BDLoRAError(f"found no run to report, expected one at least: {reasons[0]}")
    present = {name for sample in samples for name in sample.metrics}
    return Report(
        kind="serve",
        title="Serving with many adapters",
        command=options.command,
        started=started.isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - clock, 1),
        seed=options.seed,
        machine=describe_machine(),
        settings=_settings(options),
        systems=_systems(options, adapters),
        metrics={name: metric for name, metric in (LOAD_METRICS | MEMORY_METRICS).items() if name in present},
        baselines=tuple(name for name in BASELINES if name in start) or (next(iter(start)),),
        samples=samples,
        failures=failures,
        notes=tuple(notes),
    )


def _make_adapters(options: ServeOptions) -> dict[AdapterShape, MadeAdapter]:
    """All that the systems serve, and plain LoRA's, which the sizes of the others are compared with."""
    ranks = dict.fromkeys(workload.rank for workload in options.workloads)
    shapes = {shape: r for system in options.systems for r in ranks if (shape := system.adapter(r, options.tp))}
    shapes |= {AdapterShape(r, None): r for r in shapes.values()}
    return {shape: matched_adapter(options.work, str(options.model), shape, options.seed) for shape in shapes}


def _common_flags(options: ServeOptions) -> list[str]:
    # Prompts of random tokens may begin alike. The base model would find more of them in the cache than a server
    # whose adapters each have their own.
    return ["--model", str(options.model), "--tp", str(options.tp), "--disable-radix-cache"]


def _starter(
    options: ServeOptions, system: ServedSystem, adapters: Mapping[AdapterShape, MadeAdapter], logs: Path
) -> StartServer:
    def start(count: int, rank: int) -> Server:
        flags = [*_common_flags(options), *system.flags]
        shape = system.adapter(rank, options.tp)
        if shape is not None:
            flags += adapter_flags(adapters[shape], count)
        return start_server(f"{system.name}-a{count}-r{rank}", [*flags, *options.server_flags], logs)

    return start


def _given(server: RunningServer) -> StartServer:
    return lambda count, rank: server


def _settings(options: ServeOptions) -> dict[str, Value]:
    shortest = {workload.shortest for workload in options.workloads}
    prompts = sorted({workload.num_prompts for workload in options.workloads})
    skewed = any(workload.distribution == "skewed" for workload in options.workloads)
    return {
        "model": options.model,
        "tp": options.tp,
        "rounds": options.rounds,
        "servers": "all up at once" if options.keep_servers else "one at a time",
        "load generator": "sglang.benchmark.serving, random tokens, warm-up requests left out",
        "lengths": "fixed" if shortest == {1.0} else f"uniform from {min(shortest):g} of the longest",
        "prompts per run": ", ".join(map(str, prompts)),
        "goodput bounds (ms)": " ".join(options.goodput),
        **({"skewed": f"adapter i gets {SKEW_ALPHA} times the requests of adapter i + 1"} if skewed else {}),
    }


def _systems(options: ServeOptions, adapters: Mapping[AdapterShape, MadeAdapter]) -> dict[str, System]:
    systems = {
        system.name: System(label=system.label, details=_details(options, system, adapters))
        for system in options.systems
    }
    return systems | {name: System(label=name, details={"url": url}) for name, url in options.urls.items()}


def _details(
    options: ServeOptions, system: ServedSystem, adapters: Mapping[AdapterShape, MadeAdapter]
) -> dict[str, Value]:
    details: dict[str, Value] = {"flags": " ".join([*_common_flags(options), *system.flags, *options.server_flags])}
    for r in dict.fromkeys(workload.rank for workload in options.workloads):
        shape = system.adapter(r, options.tp)
        if shape is None:
            continue
        made, plain = adapters[shape], adapters[AdapterShape(r, None)]
        details[f"r={r}: rank"] = shape.rank
        details[f"r={r}: blocks"] = shape.nblocks or 1
        details[f"r={r}: parameters"] = made.parameters
        details[f"r={r}: parameters over LoRA's"] = round(made.parameters / plain.parameters, 3)
        details[f"r={r}: bytes"] = made.num_bytes
    return details
