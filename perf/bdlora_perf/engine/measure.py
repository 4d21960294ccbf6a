"""Steps of the engine, timed in running servers, deployment by deployment.

A turn sends one batch of fresh random prompts in one message. Until each request has its first token is the prefill
(with the way to the server and back); what follows, divided by its steps, is a decode step: what it takes from one
token to the next with all requests in one batch, with everything that the engine does around the forward pass.

SGLang takes a message's requests into one prefill where its limits allow it, and the limits are set so that they do. It
prefills whatever waits before it decodes, so that even a prefill in parts would leave a decode step nearly as it is;
the report says how many were split, by the servers' logs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from bdlora_perf.engine.bandwidth import ITEM_BYTES, copy_bandwidths, step_bytes
from bdlora_perf.engine.batch import Prompts, measure_steps
from bdlora_perf.engine.beside import Bench, Deployment, Turn, turns
from bdlora_perf.engine.plan import EngineOptions
from bdlora_perf.engine.report import EngineRun, make_report
from bdlora_perf.report.schema import Report, Sample, Value
from bdlora_perf.serve.servers import adapter_names, rank_cores, send, warm_up
from bdlora_perf.server_process import ServerProcess
from bdlora_sglang.errors import BDLoRAError

_WARM_UP_STEPS = 2
_PREFILL = "Prefill batch"


def measure_engine(options: EngineOptions, doing: Callable[[str], None]) -> Report:
    """Measure all points; ``doing`` is told what comes next. Ctrl-C and SIGTERM end the servers and keep what there is.

    A server that does not start, or dies, is a failure in the report, with the end of its log.

    Raises:
        BDLoRAError: adapters cannot be made, ``before`` cannot be run, or nothing at all could be measured.
    """
    measured = EngineRun(options.command, options.seed)
    prompts = Prompts(options.shape.vocabulary, options.input_len, options.seed)
    with Bench.open(options, measured, doing) as bench:
        doing("memory bandwidth")
        measured.copies = copy_bandwidths()
        for deployment in options.deployments:
            steps = _Steps(options, deployment, prompts, measured)
            planned = [*turns(options.contenders, options.requests, options.rounds)]
            flags = options.launch_flags(deployment)
            ready = bench.take_turns("engine", deployment, flags, planned, steps.point, steps.make_ready, steps.measure)
            measured.notes += [note for before, found in ready.items() if (note := steps.split_note(before, found))]
    return make_report(options, measured)


@dataclass
class _Ready:
    """A server that is warm. It was sent ``batches`` since its log told of ``prefills``."""

    server: ServerProcess
    adapters: list[str]
    prefills: int
    batches: int = 0


@dataclass(frozen=True)
class _Steps:
    options: EngineOptions
    deployment: Deployment
    prompts: Prompts
    measured: EngineRun

    def point(self, turn: Turn) -> dict[str, Value]:
        return {**self.deployment.point(), "requests": turn.size}

    def make_ready(self, server: ServerProcess, before: bool) -> _Ready:
        if cores := rank_cores("\n".join(server.log_lines())):
            self.measured.cores[before, self.deployment.tp] = cores
        tokens = send("GET", f"{server.url}/server_info").json()["max_total_num_tokens"]
        if tokens < self.options.batch_tokens:
            raise BDLoRAError(
                f"{server.log}: found a KV cache of {tokens} tokens, expected {self.options.batch_tokens} for the "
                "largest batch: give --mem-fraction-static after '--'"
            )
        adapters = adapter_names(server)
        warm_up(server, adapters)
        for names, count in product(([], adapters), self.options.requests):
            measure_steps(server.url, self.prompts.take(count), names, _WARM_UP_STEPS)
        return _Ready(server, adapters, _num_prefills(server))

    def measure(self, turn: Turn, target: _Ready) -> list[Sample]:
        """One sample for each phase."""
        adapters = target.adapters if turn.contender.has_adapters else []
        target.batches += 1
        prompts = self.prompts.take(turn.size)
        times = measure_steps(target.server.url, prompts, adapters, self.options.decode_steps)
        num_bytes = step_bytes(self.options.shape, self.deployment.tp, ITEM_BYTES[self.deployment.dtype])
        decode = {
            "decode_ms": times.decode_ms,
            "decode_bandwidth_gbs": bandwidth_gbs(num_bytes, times.decode_ms),
        }
        figures = {"decode": decode, "prefill": {"prefill_ms": times.prefill_ms}}
        name, point = turn.contender.name, self.point(turn)
        return [
            Sample(system=name, point={**point, "phase": phase}, round=turn.round, metrics=metrics)
            for phase, metrics in figures.items()
        ]

    def split_note(self, before: bool, target: _Ready) -> str | None:
        """For a server that split batches, by its log."""
        parts = _num_prefills(target.server) - target.prefills
        if parts == target.batches:
            return None
        where = f"{self.deployment}{', before' if before else ''}"
        return f"{where}: {target.batches} batches were prefilled in {parts} parts."


def bandwidth_gbs(num_bytes: float, milliseconds: float) -> float:
    """GB/s, of 1e9 bytes."""
    return num_bytes / milliseconds / 1e6


def _num_prefills(server: ServerProcess) -> int:
    return sum(_PREFILL in line for line in server.log_lines())
