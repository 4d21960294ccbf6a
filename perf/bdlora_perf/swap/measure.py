"""Loads of adapters, timed in running servers, a TP degree after the other.

A turn loads adapters one after the other. Each is then asked for one token twice: the first request finds it cold, in
host memory, the second one in a slot. Then as many are loaded beside a stream of tokens for the base model, whose
longest gap is what loading costs others.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import psutil

from bdlora_perf.engine.batch import Prompts
from bdlora_perf.engine.beside import LORA, Bench, CheckoutOptions, Contender, Deployment, Turn, turns
from bdlora_perf.report.run import Run
from bdlora_perf.report.schema import Metric, Report, Sample, System, Value
from bdlora_perf.serve.servers import kept_as_failure, send, warm_up
from bdlora_perf.server_process import ServerProcess
from bdlora_perf.swap.prepare import prepare_batches
from bdlora_perf.swap.stream import TokenStream, longest_gap_ms

# One slot, so that every adapter is cold when its first request comes. Before base requests went without a slot, they
# needed another.
_SLOTS = 2
_PROMPT_TOKENS = 16
_STREAM_TOKENS = 1500

CONTENDERS = (Contender("now", "This checkout", before=False), Contender("before", "Before", before=True))
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


@dataclass(frozen=True, kw_only=True)
class SwapOptions(CheckoutOptions):
    """What to measure, beside what `CheckoutOptions` has.

    Attributes:
        vocabulary: of the model.
        ranks: with the TP degrees the points; r of plain LoRA, BD-LoRA gets 2r in a block for each rank.
        loads: adapters that are loaded, used and unloaded in a turn.
        dtype: of every server.
    """

    vocabulary: int
    ranks: Sequence[int]
    loads: int
    dtype: str

    @property
    def contenders(self) -> list[Contender]:
        return self.present(CONTENDERS)

    def launch_flags(self, deployment: Deployment) -> list[str]:
        """All of a server's but its port; its slots are made for the largest adapter."""
        largest = self.adapter(max(self.ranks), deployment.tp)
        own = ["--adapters", f"largest={largest.folder}", "--max-loras-per-batch", str(_SLOTS)]
        return self.flags(deployment, [*own, "--disable-radix-cache", "--max-running-requests", "8", *LORA.flags])


def measure_swap(options: SwapOptions, doing: Callable[[str], None]) -> Report:
    """Measure all points; ``doing`` is told what comes next. Ctrl-C and SIGTERM end the servers and keep what there is.

    Raises:
        BDLoRAError: adapters cannot be made, ``before`` cannot be run, or nothing at all could be measured.
    """
    run = Run(options.command, options.seed)
    with Bench.open(options, run, doing) as bench:
        for round_ in range(1, options.rounds + 1):
            for contender in options.contenders:
                doing(f"preparing batches: round {round_} of {options.rounds}, {contender.name}")
                with kept_as_failure(run.add, contender.name, {}):
                    run.samples += prepare_batches(contender.name, round_, bench.before if contender.before else None)
        for tp in options.tps:
            deployment = Deployment(tp, options.dtype)
            loads = _Loads(options, tp, Prompts(options.vocabulary, _PROMPT_TOKENS, options.seed))
            planned = [*turns(options.contenders, options.ranks, options.rounds)]
            flags = options.launch_flags(deployment)
            bench.take_turns("swap", deployment, flags, planned, loads.point, loads.make_ready, loads.measure)
    return _report(options, run)


@dataclass(frozen=True)
class _Loads:
    options: SwapOptions
    tp: int
    prompts: Prompts

    def point(self, turn: Turn) -> dict[str, Value]:
        return {"tp": self.tp, "rank": turn.size}

    def make_ready(self, server: ServerProcess, before: bool) -> ServerProcess:
        warm_up(server, ["largest"])
        return server

    def measure(self, turn: Turn, server: ServerProcess) -> list[Sample]:
        adapter = str(self.options.adapter(turn.size, self.tp).folder)
        names = [f"r{turn.size}-{turn.round}-{i}" for i in range(self.options.loads)]
        times: dict[str, list[float]] = {"load": [], "cold": [], "warm": []}
        cpu = 0.0
        for name in names:
            before = _cpu_seconds(server)
            times["load"].append(_timed(server, "load_lora_adapter", lora_name=name, lora_path=adapter))
            cpu += _cpu_seconds(server) - before
            times["cold"].append(self._first_token(server, name))
            times["warm"].append(self._first_token(server, name))
            _timed(server, "unload_lora_adapter", lora_name=name)
        metrics = {"load_cpu_ms": 1000 * cpu / len(names)}
        for what, found in times.items():
            metrics[f"median_{what}_ms"] = statistics.median(found)
            metrics[f"p99_{what}_ms"] = float(np.percentile(found, 99, method="inverted_cdf"))  # by nearest rank
        metrics |= self._beside_a_stream(server, names, adapter)
        return [Sample(system=turn.contender.name, point=self.point(turn), round=turn.round, metrics=metrics)]

    def _beside_a_stream(self, server: ServerProcess, names: Sequence[str], adapter: str) -> dict[str, float]:
        stream = TokenStream(server.url, self.prompts.take(1)[0], _STREAM_TOKENS)
        try:
            quiet = stream.times[-1]
            time.sleep(0.5)
            start = time.perf_counter()
            for name in names:
                _timed(server, "load_lora_adapter", lora_name=name, lora_path=adapter)
            stop = time.perf_counter()
        finally:
            stream.stop()
        for name in names:
            _timed(server, "unload_lora_adapter", lora_name=name)
        return {
            "gap_ms": longest_gap_ms(stream.times, start, stop),
            "quiet_gap_ms": longest_gap_ms(stream.times, quiet, start),
        }

    def _first_token(self, server: ServerProcess, name: str) -> float:
        sampling = {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}
        prompt = self.prompts.take(1)[0]
        return _timed(server, "generate", input_ids=prompt, lora_path=name, sampling_params=sampling)


def _timed(server: ServerProcess, path: str, **body: object) -> float:
    """Milliseconds of one request."""
    start = time.perf_counter()
    send("POST", f"{server.url}/{path}", json=body)
    return 1000 * (time.perf_counter() - start)


def _cpu_seconds(server: ServerProcess) -> float:
    """Of all schedulers, waiting for one another included."""
    seconds = 0.0
    for child in psutil.Process(server.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # some end meanwhile, and stay as zombies
            if "scheduler" in " ".join(child.cmdline()):
                own = child.cpu_times()
                seconds += own.user + own.system
    return seconds


def _report(options: SwapOptions, run: Run) -> Report:
    contenders, points = options.contenders, len(options.tps) * len(options.ranks)
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
            contender.name: System(
                label=contender.label,
                details={"checkout": options.checkout(contender), "flags": " ".join(options.server_flags)},
            )
            for contender in contenders
        },
        metrics=METRICS,
        baselines=tuple(contender.name for contender in contenders if contender.before),
        samples=tuple(run.samples),
        failures=tuple(run.failures),
        notes=(
            *run.broken_off(points * options.rounds * len(contenders)),
            "A cold adapter is in host memory, a warm one in a slot. A load's CPU time is that of the schedulers of "
            "all ranks, in which they also wait for one another.",
            f"The stream asks for the base model, with one request in flight, while {options.loads} adapters are "
            "loaded one after the other.",
        ),
    )
