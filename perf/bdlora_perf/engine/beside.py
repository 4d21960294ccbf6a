"""This checkout beside another one: servers of both that are up together, and the turns on them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from bdlora_perf.checkout import Surroundings, surroundings_of
from bdlora_perf.estimate.model_shape import ModelShape
from bdlora_perf.report.run import Run
from bdlora_perf.report.schema import Point, Sample, Value
from bdlora_perf.serve.adapters import MadeAdapter, matched_adapter
from bdlora_perf.serve.servers import kept_as_failure, servers_up, start_server
from bdlora_perf.serve.systems import SYSTEMS
from bdlora_perf.server_process import ServerProcess

LORA = SYSTEMS["bd-2r"]
R = TypeVar("R")


@dataclass(frozen=True)
class Contender:
    """A column of the report: requests for the base model, or for adapters, to the server of one checkout."""

    name: str
    label: str
    before: bool
    has_adapters: bool = True


@dataclass(frozen=True)
class Deployment:
    """Servers that are up at the same time: one, or one of each checkout."""

    tp: int
    dtype: str

    def point(self) -> dict[str, Value]:
        return {"tp": self.tp, "dtype": self.dtype}

    def __str__(self) -> str:
        return f"tp {self.tp}, {self.dtype}"


@dataclass(frozen=True)
class Turn:
    """One contender at one size (requests of a batch, a rank: what points of a deployment differ in), in a round."""

    round: int
    size: int
    contender: Contender


@dataclass(frozen=True, kw_only=True)
class CheckoutOptions:
    """What every measurement of two checkouts is told.

    Attributes:
        model: folder or repo id of the base model.
        tps: TP degrees, a deployment each.
        before: another checkout of this project, or None.
        server_flags: of ``bdlora launch``, for every server, after our own.
        work: folder for adapters and logs.
        command: what the user typed, for the report.
    """

    model: str
    tps: Sequence[int]
    rounds: int
    seed: int
    before: Path | None
    server_flags: Sequence[str]
    work: Path
    command: str

    def check(self, shape: ModelShape, ranks: Sequence[int]) -> None:
        """Raise `BDLoRAError` where a TP degree does not divide the model, or its blocks a rank."""
        for tp in self.tps:
            shape.check_tp(tp)
            for rank in ranks:
                LORA.adapter(rank, tp)

    def present(self, contenders: Sequence[Contender]) -> list[Contender]:
        """Those whose checkout is there."""
        return [contender for contender in contenders if self.before is not None or not contender.before]

    def checkout(self, contender: Contender) -> str:
        return str(self.before) if contender.before else "this one"

    def adapter(self, rank: int, tp: int) -> MadeAdapter:
        """BD-LoRA in place of LoRA of ``rank``; raises `BDLoRAError` where its blocks do not fit."""
        shape = LORA.adapter(rank, tp)
        assert shape is not None
        return matched_adapter(self.work.resolve(), self.model, shape, self.seed)

    def flags(self, deployment: Deployment, own: Sequence[str]) -> list[str]:
        """All of a server's but its port; paths are absolute, as servers of another checkout run elsewhere."""
        model = Path(self.model)
        flags = ["--model", str(model.resolve()) if model.exists() else self.model]
        return [*flags, "--tp", str(deployment.tp), "--dtype", deployment.dtype, *own, *self.server_flags]


def turns(contenders: Sequence[Contender], sizes: Sequence[int], rounds: int) -> Iterator[Turn]:
    """Of one deployment, in their order: the contenders are neighbours at each point, each time another one first."""
    for round_ in range(1, rounds + 1):
        for i, size in enumerate(sizes):
            by = (round_ - 1 + i) % len(contenders)
            for contender in [*contenders[by:], *contenders[:by]]:
                yield Turn(round_, size, contender)


@dataclass(frozen=True)
class Bench:
    """Where turns are taken; ``before`` is what servers of the other checkout run in, ``doing`` hears what is next."""

    options: CheckoutOptions
    run: Run
    doing: Callable[[str], None]
    before: Surroundings | None

    @classmethod
    @contextmanager
    def open(cls, options: CheckoutOptions, run: Run, doing: Callable[[str], None]) -> "Iterator[Bench]":
        """Raises `BDLoRAError` where ``options.before`` cannot be run, or nothing at all is measured.

        Ctrl-C and SIGTERM end the context, and what is measured stays.
        """
        with run.kept_when_interrupted(), ExitStack() as stack:
            before = None if options.before is None else stack.enter_context(surroundings_of(options.before))
            yield cls(options, run, doing, before)

    def take_turns(
        self,
        name: str,
        deployment: Deployment,
        flags: Sequence[str],
        planned: Sequence[Turn],
        point: Callable[[Turn], Point],
        make_ready: Callable[[ServerProcess, bool], R],
        measure: Callable[[Turn, R], Sequence[Sample]],
    ) -> dict[bool, R]:
        """Start a deployment's servers and run the turns on them; samples and failures go to ``run``.

        A turn that fails is a failure of that turn alone; a server that died has no further ones.

        Args:
            name: of the logs.
            make_ready: gives what ``measure`` needs, of a server that answers and whether it is that of before.

        Returns:
            That of the servers which are still up after the last turn, by whether they are those of before.
        """
        self.doing(f"{deployment}: starting")
        # A server goes by the name of its first contender.
        names = {turn.contender.before: turn.contender.name for turn in reversed(planned)}
        logs = (self.options.work / "logs").resolve()
        servers: dict[str, ServerProcess] = {}

        def start(before: bool) -> ServerProcess:
            log = f"{name}-tp{deployment.tp}-{deployment.dtype}{'-before' if before else ''}"
            server = servers[names[before]] = start_server(log, flags, logs, self.before if before else None)
            return server

        def prepare(name: str, server: ServerProcess) -> R:
            return make_ready(server, name == names.get(True))

        starts = {names[before]: partial(start, before) for before in sorted(names)}
        with servers_up(starts, prepare, deployment.point()) as (ready, failures):
            self.run.failures += failures
            for done, turn in enumerate(planned, 1):
                server = names[turn.contender.before]
                if server not in ready:
                    continue
                where = f"{deployment}: round {turn.round} of {self.options.rounds}, {turn.contender.name}"
                self.doing(f"{where}, turn {done} of {len(planned)}")
                with kept_as_failure(self.run.add, turn.contender.name, point(turn), servers[server]):
                    self.run.samples += measure(turn, ready[server])
                if servers[server].exit_code is not None:
                    del ready[server]
            return {before: ready[server] for before, server in names.items() if server in ready}
