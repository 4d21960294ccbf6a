"""The order of the runs, and the runs."""

import random
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Protocol

from bdlora_perf.report.schema import Failure, Point, Sample, Value
from bdlora_perf.serve.contenders import Contender, Given, Ready
from bdlora_perf.serve.load import Api, Request, make_requests, run_load
from bdlora_perf.serve.metrics import run_metrics
from bdlora_perf.serve.servers import Server, failure_of, servers_up
from bdlora_perf.serve.workload import Workload
from bdlora_sglang.errors import BDLoRAError

# The bisection for the highest rate: so many halvings, and the share of requests that must be within the bounds.
_HALVINGS = 6
_WITHIN = 0.99

# What a server must agree on with those that it is compared with: what runs, as it says itself.
EQUAL = ("device", "dtype", "KV cache (tokens)", "slots", "cores")
# Blocks of a cache are of some tokens.
_KV_SLACK = 0.02


@dataclass(frozen=True)
class Turn:
    """One run: a system at a point, in a round (from 1)."""

    round: int
    system: str
    workload: Workload

    @property
    def key(self) -> tuple[str, int, frozenset[tuple[str, Value]]]:
        return self.system, self.round, frozenset(self.workload.point().items())


# Turns whose servers are up at the same time, and nothing else is.
Batch = list[Turn]


def schedule(
    systems: Sequence[str],
    workloads: Sequence[Workload],
    rounds: int,
    keep_servers: bool,
    seed: int,
    rounds_a_start: int = 1,
) -> list[Batch]:
    """The turns in the order in which they are run.

    With ``keep_servers`` all systems' servers are up at once and take turns at each point, so that samples to be
    compared are neighbours in time; else one server is up at a time and runs all points of ``rounds_a_start`` rounds.
    The order of the systems is drawn anew each time, but where each is started once: then it is the one given, so that
    whoever stops early has what was named first.
    """
    rng = random.Random(seed)
    firsts = range(1, rounds + 1, rounds_a_start)
    batches: list[Batch] = []
    for _, group in groupby(workloads, key=lambda workload: workload.deployment):
        points = list(group)
        if keep_servers:
            batches.append(
                [
                    Turn(round_, system, workload)
                    for round_ in range(1, rounds + 1)
                    for workload in points
                    for system in rng.sample(systems, len(systems))
                ]
            )
        else:
            batches += [
                [
                    Turn(round_, system, workload)
                    for round_ in range(first, min(first + rounds_a_start, rounds + 1))
                    for workload in points
                ]
                for first in firsts
                for system in (rng.sample(systems, len(systems)) if len(firsts) > 1 else systems)
            ]
    return batches


class Watcher(Protocol):
    """Is told how a sweep goes on."""

    def doing(self, what: str) -> None: ...
    def turn_is_over(self) -> None: ...


@dataclass(frozen=True)
class SweepRunner:
    """Runs turns on servers that it starts by ``contenders`` and stops again; ``runs`` is filled with what runs there.

    ``api``: how all are asked; by default as each likes it best.

    ``find_rate``: of each point the highest rate within the ``bounds`` is looked for, in place of its own load.
    """

    contenders: Mapping[str, Contender]
    bounds: Mapping[str, float]
    find_rate: bool
    seed: int
    watcher: Watcher
    runs: dict[str, Mapping[str, Value]]
    api: Api | None = None

    def run(self, batches: Sequence[Batch], done: Collection[object] = ()) -> Generator[Sample | Failure, None, None]:
        """Samples and failures as they come, but for the turns ``done``. Close the generator to stop the servers.

        A server that does not start, or dies, makes one failure; its system is left out for the rest of the turns with
        these adapters. A run that fails on a server that lives makes a failure, too, and the server goes on.

        Raises:
            BDLoRAError: servers that are up together differ in what must be equal.
        """
        lost: set[tuple[str, tuple[int, ...]]] = set()
        for batch in batches:
            workload = batch[0].workload
            own = [turn for turn in batch if turn.key not in done]
            for _ in range(len(batch) - len(own)):
                self.watcher.turn_is_over()
            systems = [n for n in dict.fromkeys(turn.system for turn in own) if (n, workload.deployment) not in lost]
            self.watcher.doing(f"starting {', '.join(systems)}")
            starts = {name: partial(self.contenders[name].start, workload) for name in systems}
            where: Point = {"adapters": workload.adapters, "slots": workload.slots}
            with servers_up(starts, partial(self._make_ready, workload), where) as (ready, failures):
                for failure in failures:
                    lost.add((failure.system, workload.deployment))
                    yield failure
                for name, each in ready.items():
                    self.runs[name] = each.runs
                    self._check_equal(name)
                for turn in own:
                    if turn.system in ready:
                        target = ready[turn.system]
                        yield self._measure(turn, target)
                        if target.server.exit_code is not None:
                            lost.add((turn.system, workload.deployment))
                            del ready[turn.system]
                    self.watcher.turn_is_over()

    def _make_ready(self, workload: Workload, name: str, server: Server) -> Ready:
        """Every adapter is loaded once, as far as there are slots."""
        ready = self.contenders[name].inspect(server, workload, self.api)
        names: Sequence[str | None] = ready.adapters or [None]
        first = [Request([20, 30, 40, 50], 4, adapter) for adapter in names]
        if errors := [o.error for o in run_load(ready.target, first, 8, lambda: server.exit_code is None) if o.error]:
            raise BDLoRAError(f"found {len(errors)} of {len(first)} first requests failed: {errors[0]}")
        return ready

    def _check_equal(self, name: str) -> None:
        """Raise `BDLoRAError` where what must be equal differs from another server that is started here."""
        started = [system for system in self.runs if not isinstance(self.contenders[system], Given)]
        for other in set(started) - {name} if name in started else ():
            for what in EQUAL:
                here, there = self.runs[name].get(what), self.runs[other].get(what)
                if here is None or there is None or here == there:
                    continue
                if what == "KV cache (tokens)" and abs(int(here) / int(there) - 1) <= _KV_SLACK:
                    continue
                raise BDLoRAError(f"{what}: found {here} for {name} and {there} for {other}, expected the same")

    def _measure(self, turn: Turn, ready: Ready) -> Sample | Failure:
        self.watcher.doing(f"round {turn.round}, {turn.system}")
        point = turn.workload.point()
        try:
            metrics = self._search(turn, ready) if self.find_rate else self._one_run(turn, ready, turn.workload)
        except BDLoRAError as error:
            return failure_of(turn.system, point, error, ready.server)
        if ready.server.exit_code is not None or "output_throughput" not in metrics:
            return failure_of(turn.system, point, BDLoRAError("all requests failed"), ready.server)
        return Sample(system=turn.system, point=point, round=turn.round, metrics={**metrics, **ready.memory})

    def _one_run(self, turn: Turn, ready: Ready, workload: Workload) -> dict[str, float]:
        requests = make_requests(workload, ready.adapters, self.seed + turn.round)
        outcomes = run_load(ready.target, requests, workload.concurrency, lambda: ready.server.exit_code is None)
        last = requests[-1].at
        offered = (len(requests) - 1) / last if last else None
        return run_metrics(outcomes, offered, self.bounds)

    def _search(self, turn: Turn, ready: Ready) -> dict[str, float]:
        """Bisection between nothing and what the point's own load reached: the figures of the highest rate."""
        high = self._one_run(turn, ready, turn.workload).get("request_throughput", 0.0)
        low, best = 0.0, None
        for _ in range(_HALVINGS if high else 0):
            rate = (low + high) / 2
            workload = replace(turn.workload, concurrency=None, request_rate=rate, trace=())
            found = self._one_run(turn, ready, workload)
            if found.get("slo_attainment", 0.0) >= _WITHIN:
                low, best = rate, found
            else:
                high = rate
        if best is None:
            raise BDLoRAError(f"found no rate down to {high:.3g} req/s within the bounds, expected one")
        return {**best, "rate_within_slo": low}
