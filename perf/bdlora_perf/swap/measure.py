"""The servers of one TP degree after the other, and the turns on them.

A turn loads adapters one after the other. Each is then asked for one token twice: the first request finds it cold, in
host memory, the second one in a slot. Then as many are loaded beside a stream of tokens for the base model, whose
longest gap is what loading costs others.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from bdlora_perf.checkout import Surroundings, surroundings_of
from bdlora_perf.engine.batch import Prompts
from bdlora_perf.report.run import Run
from bdlora_perf.report.schema import Metric, Report, Sample, System
from bdlora_perf.serve.servers import failure_of, send, start_server, warm_up
from bdlora_perf.server_process import ServerProcess
from bdlora_perf.swap.plan import BEFORE, NOW, SwapOptions, Turn, launch_flags, make_adapter, turns
from bdlora_perf.swap.prepare import prepare_batches
from bdlora_perf.swap.stream import TokenStream, longest_gap_ms
from bdlora_sglang.errors import BDLoRAError

_PROMPT_TOKENS = 16
_STREAM_TOKENS = 1500

METRICS: dict[str, Metric] = {
    "median_load_ms": Metric(label="Median time to load an adapter", unit="ms", better="lower"),
    "p99_load_ms": Metric(label="P99 time to load an adapter", unit="ms", better="lower"),
    "load_cpu_ms": Metric(label="CPU time of all ranks to load an adapter", unit="ms", better="lower"),
    "median_cold_ms": Metric(label="Median first token, cold adapter", unit="ms", better="lower"),
    "p99_cold_ms": Metric(label="P99 first token, cold adapter", unit="ms", better="lower"),
    "median_warm_ms": Metric(label="Median first token, warm adapter", unit="ms", better="lower"),
    "p99_warm_ms": Metric(label="P99 first token, warm adapter", unit="ms", better="lower"),
    "gap_ms": Metric(label="Longest gap between tokens while adapters load", unit="ms", better="lower"),
    "quiet_gap_ms": Metric(label="Longest gap between tokens while none does", unit="ms"),
    "prepare_same_us": Metric(label="CPU time to prepare a decode batch like the last", unit="us", better="lower"),
    "prepare_new_us": Metric(label="CPU time to prepare another decode batch", unit="us", better="lower"),
    "prepare_base_us": Metric(label="CPU time to prepare a decode batch of the base model", unit="us", better="lower"),
}


def measure_swap(options: SwapOptions, doing: Callable[[str], None]) -> Report:
    """Measure all points; ``doing`` is told what comes next. Ctrl-C and SIGTERM end the servers and keep what there is.

    Raises:
        BDLoRAError: adapters cannot be made, ``before`` cannot be run, or nothing at all could be measured.
    """
    run = Run(options.command, options.seed)
    with run.kept_when_interrupted(), ExitStack() as stack:
        before = None if options.before is None else stack.enter_context(surroundings_of(options.before))
        surroundings = {NOW: None, BEFORE: before}
        for round_ in range(1, options.rounds + 1):
            for system in options.systems:
                doing(f"preparing batches: round {round_} of {options.rounds}, {system}")
                try:
                    run.samples += prepare_batches(system, round_, surroundings[system])
                except BDLoRAError as error:
                    run.add(failure_of(system, {}, error))
        for tp in options.tps:
            _measure_tp(options, tp, surroundings, run, doing)
    return _report(options, run)


def _measure_tp(
    options: SwapOptions,
    tp: int,
    surroundings: dict[str, Surroundings | None],
    run: Run,
    doing: Callable[[str], None],
) -> None:
    prompts = Prompts(options.vocabulary, _PROMPT_TOKENS, options.seed)
    doing(f"tp {tp}: starting")
    with ExitStack() as stack:
        servers = {}
        for system in options.systems:
            name, logs = f"swap-tp{tp}-{system}", (options.work / "logs").resolve()
            servers[system] = start_server(name, launch_flags(options, tp), logs, surroundings[system])
            stack.callback(servers[system].stop)
        for server in servers.values():
            server.wait_until_healthy()
            warm_up(server, ["largest"])
        for turn in turns(options):
            doing(f"tp {tp}: round {turn.round} of {options.rounds}, rank {turn.rank}, {turn.system}")
            server = servers[turn.system]
            try:
                metrics = _Turn(options, server, make_adapter(options, tp, turn.rank).folder, prompts).run(turn)
            except BDLoRAError as error:
                run.add(failure_of(turn.system, turn.point(tp), error, server))
            else:
                run.add(Sample(system=turn.system, point=turn.point(tp), round=turn.round, metrics=metrics))


@dataclass(frozen=True)
class _Turn:
    options: SwapOptions
    server: ServerProcess
    adapter: Path
    prompts: Prompts

    def run(self, turn: Turn) -> dict[str, float]:
        names = [f"r{turn.rank}-{turn.round}-{i}" for i in range(self.options.loads)]
        load, cold, warm = [], [], []
        cpu = 0.0
        for name in names:
            before = self._cpu_seconds()
            load.append(self._timed("load_lora_adapter", lora_name=name, lora_path=str(self.adapter)))
            cpu += self._cpu_seconds() - before
            cold.append(self._first_token(name))
            warm.append(self._first_token(name))
            self._timed("unload_lora_adapter", lora_name=name)
        metrics = {"load_cpu_ms": 1000 * cpu / len(names)}
        for what, times in (("load", load), ("cold", cold), ("warm", warm)):
            metrics[f"median_{what}_ms"] = statistics.median(times)
            metrics[f"p99_{what}_ms"] = _percentile(times, 99)
        return metrics | self._beside_a_stream(names)

    def _beside_a_stream(self, names: list[str]) -> dict[str, float]:
        stream = TokenStream(self.server.url, self.prompts.take(1)[0], _STREAM_TOKENS)
        try:
            quiet = stream.times[-1]
            time.sleep(0.5)
            start = time.perf_counter()
            for name in names:
                self._timed("load_lora_adapter", lora_name=name, lora_path=str(self.adapter))
            stop = time.perf_counter()
        finally:
            stream.stop()
        for name in names:
            self._timed("unload_lora_adapter", lora_name=name)
        return {
            "gap_ms": longest_gap_ms(stream.times, start, stop),
            "quiet_gap_ms": longest_gap_ms(stream.times, quiet, start),
        }

    def _first_token(self, name: str) -> float:
        sampling = {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}
        prompt = self.prompts.take(1)[0]
        return self._timed("generate", input_ids=prompt, lora_path=name, sampling_params=sampling)

    def _timed(self, path: str, **body: object) -> float:
        """Milliseconds of one request."""
        start = time.perf_counter()
        send("POST", f"{self.server.url}/{path}", json=body)
        return 1000 * (time.perf_counter() - start)

    def _cpu_seconds(self) -> float:
        """Of all schedulers, waiting for one another included."""
        seconds = 0.0
        for child in psutil.Process(self.server.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # some end meanwhile, and stay as zombies
                if "scheduler" in " ".join(child.cmdline()):
                    own = child.cpu_times()
                    seconds += own.user + own.system
        return seconds


def _percentile(values: list[float], percent: int) -> float:
    """By nearest rank."""
    return sorted(values)[-(-percent * len(values) // 100) - 1]


def _report(options: SwapOptions, run: Run) -> Report:
    notes = [
        *run.broken_off(options.num_turns),
        "A cold adapter is in host memory, a warm one in a slot. A load's CPU time is that of the schedulers of all "
        "ranks, in which they also wait for one another.",
        f"The stream asks for the base model, with one request in flight, while {options.loads} adapters are loaded "
        "one after the other.",
    ]
    return Report(
        kind="swap",
        title="Swapping adapters",
        **run.head(),
        settings={
            "model": options.model,
            "dtype": options.dtype,
            "loads of a turn": options.loads,
            "rounds": options.rounds,
        },
        systems={
            system: System(
                label="This checkout" if system == NOW else "Before",
                details={
                    "checkout": "this one" if system == NOW else str(options.before),
                    "flags": " ".join(options.server_flags),
                },
            )
            for system in options.systems
        },
        metrics=METRICS,
        baselines=(BEFORE,) if options.before is not None else (),
        samples=tuple(run.samples),
        failures=tuple(run.failures),
        notes=tuple(notes),
    )
