"""The order of the runs, and the runs."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from bdlora_perf.report.schema import Failure, Sample, Value
from bdlora_perf.serve.load import LoadGenerator, generator_arguments
from bdlora_perf.serve.metrics import load_metrics
from bdlora_perf.serve.servers import Server, StartServer, adapter_names, memory_metrics, warm_up
from bdlora_perf.serve.workload import Workload
from bdlora_sglang.errors import BDLoRAError


@dataclass(frozen=True)
class Turn:
    """One run: a system at a point, in a round (from 1)."""

    round: int
    system: str
    workload: Workload


# Turns whose servers are up at the same time, and nothing else is.
Batch = list[Turn]


def schedule(systems: Sequence[str], workloads: Sequence[Workload], rounds: int, keep_servers: bool) -> list[Batch]:
    """The turns in the order in which they are run.

    With ``keep_servers`` all systems' servers are up at once and take turns at each point, so that samples to be
    compared are neighbours in time; else one server is up at a time and runs all points of a round. Every round begins
    with another system, so that none always runs first.
    """
    batches: list[Batch] = []
    for _, group in groupby(workloads, key=lambda workload: workload.deployment):
        points = list(group)
        if keep_servers:
            batches.append(
                [
                    Turn(round_, system, workload)
                    for round_ in range(1, rounds + 1)
                    for i, workload in enumerate(points)
                    for system in _rotated(systems, round_ - 1 + i)
                ]
            )
        else:
            batches += [
                [Turn(round_, system, workload) for workload in points]
                for round_ in range(1, rounds + 1)
                for system in _rotated(systems, round_ - 1)
            ]
    return batches


def _rotated(systems: Sequence[str], by: int) -> list[str]:
    by %= len(systems)
    return [*systems[by:], *systems[:by]]


class Watcher(Protocol):
    """Is told how a sweep goes on."""

    def doing(self, what: str) -> None: ...
    def turn_is_over(self) -> None: ...


@dataclass(frozen=True)
class _ReadyServer:
    server: Server
    adapters: Sequence[str]
    memory: dict[str, float]


@dataclass(frozen=True)
class SweepRunner:
    """Runs turns on servers that it starts by ``start`` and stops again.

    ``tokenizer`` is the base model's folder or repo id; None lets the generator ask the server.
    """

    start: Mapping[str, StartServer]
    generator: LoadGenerator
    tp: int
    tokenizer: str | None
    goodput: Sequence[str]
    seed: int
    watcher: Watcher

    def run(self, batches: Sequence[Batch]) -> Generator[Sample | Failure, None, None]:
        """Samples and failures as they come. Close the generator to stop the servers before its end.

        A server that does not start, or dies, makes one failure; its system is left out for the rest of the turns with
        these adapters. A run that fails on a server that lives makes a failure, too, and the server goes on.
        """
        lost: set[tuple[str, tuple[int, int]]] = set()
        for batch in batches:
            deployment = batch[0].workload.deployment
            systems = [name for name in dict.fromkeys(turn.system for turn in batch) if (name, deployment) not in lost]
            with ExitStack() as stack:
                # All are under way before the first is waited for.
                servers = {name: self._start(name, deployment, stack) for name in systems}
                ready: dict[str, _ReadyServer] = {}
                for name, server in servers.items():
                    outcome = server if isinstance(server, Failure) else self._make_ready(name, server, deployment)
                    if isinstance(outcome, Failure):
                        lost.add((name, deployment))
                        yield outcome
                    else:
                        ready[name] = outcome
                for turn in batch:
                    if turn.system in ready:
                        target = ready[turn.system]
                        yield self._measure(turn, target)
                        if target.server.exit_code is not None:
                            lost.add((turn.system, deployment))
                            del ready[turn.system]
                    self.watcher.turn_is_over()

    def _start(self, name: str, deployment: tuple[int, int], stack: ExitStack) -> Server | Failure:
        """A server that is under way; ``stack`` stops it."""
        try:
            server = self.start[name](*deployment)
        except BDLoRAError as error:
            return _failure(name, self._deployment_point(deployment), error)
        stack.callback(server.stop)
        return server

    def _make_ready(self, name: str, server: Server, deployment: tuple[int, int]) -> _ReadyServer | Failure:
        self.watcher.doing(f"{name}: starting")
        try:
            server.wait_until_healthy()
            adapters = adapter_names(server)
            warm_up(server, adapters)
            return _ReadyServer(server, adapters, memory_metrics(server))
        except BDLoRAError as error:
            return _failure(name, self._deployment_point(deployment), error, server)

    def _deployment_point(self, deployment: tuple[int, int]) -> dict[str, Value]:
        adapters, rank = deployment
        return {"adapters": adapters, "rank": rank, "tp": self.tp}

    def _measure(self, turn: Turn, target: _ReadyServer) -> Sample | Failure:
        self.watcher.doing(f"round {turn.round}, {turn.system}")
        server, point = target.server, turn.workload.point(self.tp)
        try:
            arguments = generator_arguments(
                server.url, turn.workload, target.adapters, self.tokenizer, self.goodput, self.seed + turn.round
            )
            result = self.generator.run(arguments, lambda: server.exit_code is None)
        except BDLoRAError as error:
            return _failure(turn.system, point, error, server)
        return Sample(system=turn.system, point=point, round=turn.round, metrics=load_metrics(result) | target.memory)


def _failure(system: str, point: dict[str, Value], error: BDLoRAError, server: Server | None = None) -> Failure:
    """The first line of an error says what happened, the others are the end of a log: the server's, if it is dead."""
    message, _, log_tail = str(error).partition("\n")
    if server is not None and server.exit_code is not None:
        message, log_tail = f"the server ended with exit code {server.exit_code}", server.log_tail()
    return Failure(system=system, point=point, message=message, log_tail=log_tail)
