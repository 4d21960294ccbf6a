"""The servers of one deployment after the other, and the turns on them.

A turn sends one batch of fresh random prompts in one message. Until each request has its first token is the prefill
(with the way to the server and back); what follows, divided by its steps, is a decode step: what it takes from one
token to the next with all requests in one batch, with everything that the engine does around the forward pass.

SGLang takes a message's requests into one prefill where its limits allow it, and the limits are set so that they do. It
prefills whatever waits before it decodes, so that even a prefill in parts would leave a decode step nearly as it is;
the report says how many were split, by the servers' logs.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product

from bdlora_perf.checkout import Surroundings, surroundings_of
from bdlora_perf.engine.bandwidth import copy_bandwidths, step_bytes
from bdlora_perf.engine.batch import Prompts, measure_steps
from bdlora_perf.engine.plan import ITEM_BYTES, Deployment, EngineOptions, Turn, launch_flags, turns
from bdlora_perf.engine.report import EngineRun, make_report
from bdlora_perf.report.schema import Failure, Report, Sample, Value
from bdlora_perf.serve.servers import adapter_names, failure_of, rank_cores, send, start_server, warm_up
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
    with measured.kept_when_interrupted(), ExitStack() as stack:
        before = None if options.before is None else stack.enter_context(surroundings_of(options.before))
        doing("memory bandwidth")
        measured.copies = copy_bandwidths()
        prompts = Prompts(options.shape.vocabulary, options.input_len, options.seed)
        _Runner(options, before, prompts, doing).run(measured)
    return make_report(options, measured)


@dataclass
class _Ready:
    """A server that is warm. It was sent ``batches`` since its log told of ``prefills``."""

    server: ServerProcess
    adapters: list[str]
    prefills: int
    batches: int = field(default=0)


@dataclass(frozen=True)
class _Runner:
    options: EngineOptions
    before: Surroundings | None
    prompts: Prompts
    doing: Callable[[str], None]

    def run(self, measured: EngineRun) -> None:
        """Everything; what is measured is in ``measured`` at any time."""
        done = 0
        for deployment in self.options.deployments:
            self.doing(f"{deployment}: starting")
            with ExitStack() as stack:
                ready = self._start(deployment, measured, stack)
                for turn in turns(self.options):
                    done += 1
                    self.doing(
                        f"{deployment}: round {turn.round} of {self.options.rounds}, {turn.contender.name}, "
                        f"{turn.requests} requests (turn {done} of {self.options.num_turns})"
                    )
                    target = ready.get(turn.contender.before)
                    if target is None:
                        continue
                    outcome = self._measure(deployment, turn, target)
                    if isinstance(outcome, Failure):
                        measured.failures.append(outcome)
                        if target.server.exit_code is not None:
                            del ready[turn.contender.before]
                    else:
                        measured.samples += outcome
                for before, target in ready.items():
                    _count_prefills(deployment, before, target, measured)

    def _start(self, deployment: Deployment, measured: EngineRun, stack: ExitStack) -> dict[bool, _Ready]:
        """The servers, warm, by whether they are those of before; ``stack`` stops them. Failures are kept."""
        flags = launch_flags(self.options, deployment)
        servers: dict[bool, ServerProcess] = {}
        # All are under way before the first is waited for.
        for before in dict.fromkeys(contender.before for contender in self.options.contenders):
            name = f"engine-tp{deployment.tp}-{deployment.dtype}{'-before' if before else ''}"
            logs = (self.options.work / "logs").resolve()
            server = start_server(name, flags, logs, self.before if before else None)
            stack.callback(server.stop)
            servers[before] = server
        ready: dict[bool, _Ready] = {}
        for before, server in servers.items():
            outcome = self._make_ready(deployment, server, before)
            if isinstance(outcome, Failure):
                measured.failures.append(outcome)
            else:
                ready[before] = outcome
        for before, target in ready.items():
            if cores := rank_cores("\n".join(target.server.log_lines())):
                measured.cores[before, deployment.tp] = cores
        return ready

    def _make_ready(self, deployment: Deployment, server: ServerProcess, before: bool) -> _Ready | Failure:
        own = [contender for contender in self.options.contenders if contender.before == before]
        try:
            server.wait_until_healthy()
            self._check_cache(server)
            adapters = adapter_names(server)
            self.doing(f"{deployment}: warming up")
            warm_up(server, adapters)
            for contender, count in product(own, self.options.requests):
                names = adapters if contender.has_adapters else []
                measure_steps(server.url, self.prompts.take(count), names, _WARM_UP_STEPS)
        except BDLoRAError as error:
            return failure_of(own[0].name, deployment.point(), error, server)
        return _Ready(server, adapters, _num_prefills(server))

    def _check_cache(self, server: ServerProcess) -> None:
        tokens = send("GET", f"{server.url}/server_info").json()["max_total_num_tokens"]
        if tokens < self.options.batch_tokens:
            raise BDLoRAError(
                f"{server.log}: found a KV cache of {tokens} tokens, expected {self.options.batch_tokens} for the "
                "largest batch: give --mem-fraction-static after '--'"
            )

    def _measure(self, deployment: Deployment, turn: Turn, target: _Ready) -> list[Sample] | Failure:
        """One sample for each phase."""
        point: dict[str, Value] = {**deployment.point(), "requests": turn.requests}
        adapters = target.adapters if turn.contender.has_adapters else []
        target.batches += 1
        prompts = self.prompts.take(turn.requests)
        try:
            times = measure_steps(target.server.url, prompts, adapters, self.options.decode_steps)
        except BDLoRAError as error:
            return failure_of(turn.contender.name, point, error, target.server)
        num_bytes = step_bytes(self.options.shape, deployment.tp, ITEM_BYTES[deployment.dtype])
        figures = {
            "decode": {
                "decode_ms": times.decode_ms,
                "decode_bandwidth_gbs": bandwidth_gbs(num_bytes, times.decode_ms),
            },
            "prefill": {"prefill_ms": times.prefill_ms},
        }
        return [
            Sample(system=turn.contender.name, point={**point, "phase": phase}, round=turn.round, metrics=metrics)
            for phase, metrics in figures.items()
        ]


def bandwidth_gbs(num_bytes: float, milliseconds: float) -> float:
    """GB/s, of 1e9 bytes."""
    return num_bytes / milliseconds / 1e6


def _num_prefills(server: ServerProcess) -> int:
    return sum(_PREFILL in line for line in server.log_lines())


def _count_prefills(deployment: Deployment, before: bool, target: _Ready, measured: EngineRun) -> None:
    parts = _num_prefills(target.server) - target.prefills
    if parts != target.batches:
        where = f"{deployment}{', before' if before else ''}"
        measured.notes.append(f"{where}: {target.batches} batches were prefilled in {parts} parts.")
