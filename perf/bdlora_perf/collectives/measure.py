"""The collectives of running servers: started, profiled and counted, system by system."""

import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from bdlora_perf.collectives.count import Collective, read_traces, traffic_elements
from bdlora_perf.collectives.formulas import added_by_lora, agree
from bdlora_perf.collectives.forwards import PARTS, PHASES, Forward, forwards
from bdlora_perf.collectives.timing import Message, backend, time_collectives
from bdlora_perf.engine.bandwidth import ITEM_BYTES, shape_of
from bdlora_perf.engine.batch import Prompts
from bdlora_perf.report.run import Run
from bdlora_perf.report.schema import Metric, Point, Report, Sample, System, Value
from bdlora_perf.serve.adapters import adapter_flags, matched_adapter
from bdlora_perf.serve.servers import Server, adapter_names, send, servers_up, start_server, warm_up
from bdlora_perf.serve.systems import ServedSystem
from bdlora_sglang.errors import BDLoRAError

# Sizes for the curve of time against size, beside those that were counted: 256 B to 4 MiB.
_CURVE = tuple(2**exponent for exponent in range(8, 23, 2))
# Token ids that every model has.
_VOCABULARY = 250

METRICS: dict[str, Metric] = {
    "collectives_per_forward": Metric(label="Collectives of a forward", unit="", better="lower"),
    "bytes_per_forward": Metric(label="Bytes that a rank receives in a forward", unit="B", better="lower"),
    # No ratios: the systems are not neighbours in time, as they are in ``bdlora perf serve``.
    "forward_ms": Metric(label="Forward", unit="ms"),
    **{f"breakdown_{part}_ms": Metric(label=part.capitalize(), unit="ms") for part in PARTS},
    "time_us": Metric(label="Time of one collective", unit="us", better="lower"),
}


@dataclass(frozen=True)
class CollectivesOptions:
    """What to count.

    Attributes:
        model: folder or repo id of the base model.
        systems: servers to start, one after the other; each gets as many adapters as there are sequences in the batch.
        batch_size: sequences of one batch.
        input_len: tokens of each prompt.
        decode_steps: decode forwards of one round.
        rank: r of plain LoRA; the other systems' adapters are matched to it.
        dtype: of the server; one of SGLang's names.
        command: what the user typed, for the report.
    """

    model: str
    tp: int
    systems: Sequence[ServedSystem]
    batch_size: int
    input_len: int
    decode_steps: int
    rank: int
    rounds: int
    seed: int
    dtype: str
    server_flags: Sequence[str]
    work: Path
    command: str

    def flags(self, system: ServedSystem) -> list[str]:
        """All of a server's but its port."""
        flags = ["--model", self.model, "--tp", str(self.tp), "--dtype", self.dtype, *system.flags]
        if (shape := system.adapter(self.rank, self.tp)) is not None:
            adapter = matched_adapter(self.work, self.model, shape, self.seed)
            flags += adapter_flags(adapter, self.batch_size, self.batch_size)
        return [*flags, *self.server_flags]

    def tokens(self, phase: str) -> int:
        """Of one forward."""
        return self.batch_size * (self.input_len if phase == "prefill" else 1)


def measure_collectives(options: CollectivesOptions, doing: Callable[[str], None]) -> Report:
    """Count the collectives of every system, and time each size that was seen; ``doing`` is told what comes next.

    Ctrl-C and SIGTERM end the servers and keep what there is; a server that does not start or answer is a failure.

    Raises:
        BDLoRAError: ranks or forwards of a phase differ in what they send, or nothing at all could be measured.
    """
    run = Run(options.command, options.seed)
    per_forward: dict[tuple[str, str], Counter[Collective]] = {}
    operations: list[str] = []
    rounds = 0
    with run.kept_when_interrupted():
        for system in options.systems:
            doing(f"{system.name}: starting")
            start = partial(start_server, system.name, options.flags(system), options.work / "logs")
            with servers_up({system.name: start}, _make_ready, {}) as (ready, failures):
                run.failures += failures
                for server, names in ready.values():
                    for round_ in range(1, options.rounds + 1):
                        doing(f"{system.name}: round {round_}")
                        found = _profile_batch(options, server, names, round_)
                        for phase in PHASES:
                            alike = [forward for forward in found if forward.phase == phase]
                            per_forward[system.name, phase] = _same_in_all(alike, system, phase)
                            run.samples += _samples(options, system.name, phase, round_, alike)
                        rounds += 1
        if options.tp > 1:
            doing("timing collectives alone")
            timed = _time_samples(options, per_forward)
            operations = list(dict.fromkeys(sample.system for sample in timed))
            run.samples += timed
    return Report(
        kind="collectives",
        title="Collectives of one forward pass",
        **run.head(),
        settings=_settings(options),
        systems={
            **{
                system.name: System(label=system.label, details=_details(options, system)) for system in options.systems
            },
            **{name: System(label=f"{name} alone ({backend()})") for name in operations},
        },
        metrics=METRICS,
        baselines=tuple(system.name for system in options.systems if system.name in ("lora-fully-sharded", "base")),
        samples=tuple(run.samples),
        failures=tuple(run.failures),
        notes=(*run.broken_off(options.rounds * len(options.systems), rounds), *_notes(options, per_forward)),
    )


def _make_ready(_: str, server: Server) -> tuple[Server, list[str]]:
    """With its adapters, each in a slot."""
    names = adapter_names(server)
    warm_up(server, names)
    return server, names


def _profile_batch(options: CollectivesOptions, server: Server, names: Sequence[str], round_: int) -> list[Forward]:
    """The forwards of all ranks for one batch of requests, each with an adapter of its own where there are any."""
    with tempfile.TemporaryDirectory() as folder:
        activities = ["CPU", "GPU"] if backend() == "nccl" else ["CPU"]
        profiler = {"output_dir": folder, "activities": activities, "record_shapes": True, "with_stack": False}
        send("POST", f"{server.url}/start_profile", json=profiler)
        request: dict[str, object] = {
            "input_ids": Prompts(_VOCABULARY, options.input_len, options.seed + round_).take(options.batch_size),
            "sampling_params": {"temperature": 0, "max_new_tokens": options.decode_steps + 1, "ignore_eos": True},
        }
        if names:
            request["lora_path"] = names
        send("POST", f"{server.url}/generate", json=request)
        send("POST", f"{server.url}/stop_profile")
        return [forward for events in read_traces(Path(folder)).values() for forward in forwards(events)]


def _same_in_all(alike: Sequence[Forward], system: ServedSystem, phase: str) -> Counter[Collective]:
    """The collectives of a forward: the same in every forward of a phase and on every rank, or something is wrong."""
    kinds = {tuple(sorted(forward.collectives.items())) for forward in alike}
    if len(kinds) != 1:
        raise BDLoRAError(
            f"{system.name}: found {len(kinds)} different sets of collectives in {len(alike)} {phase} forwards, "
            "expected one: the batch was split, or another client used the server"
        )
    return alike[0].collectives


def _samples(
    options: CollectivesOptions, system: str, phase: str, round_: int, alike: Sequence[Forward]
) -> Iterator[Sample]:
    """Counts by operation; and times, medians over the ranks and forwards, whose parts are shares of the median."""
    point: Point = {"phase": phase, "tokens": options.tokens(phase), "rank": options.rank, "tp": options.tp}
    for operation in ("all_reduce", "all_gather"):
        own = {each: count for each, count in alike[0].collectives.items() if each.operation == operation}
        metrics: dict[str, float] = {"collectives_per_forward": sum(own.values())}
        if all(collective.shape is not None for collective in own):
            traffic = sum(traffic_elements(collective, options.tp) * count for collective, count in own.items())
            metrics["bytes_per_forward"] = traffic * ITEM_BYTES[options.dtype]
        yield Sample(system=system, point={**point, "operation": operation}, round=round_, metrics=metrics)
    median = statistics.median(forward.milliseconds for forward in alike)
    total = sum(forward.milliseconds for forward in alike)
    parts = {f"breakdown_{part}_ms": median * sum(f.parts[part] for f in alike) / total for part in PARTS}
    yield Sample(system=system, point=point, round=round_, metrics={"forward_ms": median, **parts})


def _time_samples(
    options: CollectivesOptions, per_forward: Mapping[tuple[str, str], Counter[Collective]]
) -> list[Sample]:
    seen = {
        Message(collective.operation, collective.elements * ITEM_BYTES[options.dtype])
        for collectives in per_forward.values()
        for collective in collectives
        if collective.shape is not None
    }
    curve = {Message(operation, size) for operation in ("all_reduce", "all_gather") for size in _CURVE}
    return [
        Sample(
            system=message.operation,
            point={"bytes": message.num_bytes, "tp": options.tp},
            round=round_,
            metrics={"time_us": microseconds},
        )
        for message, round_, microseconds in time_collectives(
            sorted(seen | curve), options.tp, options.rounds, options.seed
        )
    ]


def _notes(options: CollectivesOptions, per_forward: Mapping[tuple[str, str], Counter[Collective]]) -> Iterator[str]:
    num_layers = shape_of(options.model).layers
    for system, phase in product(options.systems, PHASES):
        shape = system.adapter(options.rank, options.tp)
        found, base = (per_forward.get((name, phase)) for name in (system.name, "base"))
        if shape is None or found is None or base is None:
            continue
        sharded = system.name == "lora-fully-sharded"
        expected = added_by_lora(sharded, options.tokens(phase), shape.rank, num_layers, options.tp)
        added = found - base
        verdict = "as the formula says" if agree(added, expected) else f"but the formula says {expected.total()}"
        yield f"{system.label}, {phase}: LoRA adds {added.total()} collectives to the base model's, {verdict}."
    yield (
        "Times of forwards were taken under the profiler, which slows small operations down, one system after the "
        "other: they show where time goes, and `bdlora perf serve` compares systems. Bytes are what a rank receives in "
        "a ring."
    )
    if backend() != "nccl":
        yield f"{backend()} on a CPU is not NVLink: these times say nothing about a GPU's collectives."


def _settings(options: CollectivesOptions) -> dict[str, Value]:
    return {
        "model": options.model,
        "tp": options.tp,
        "dtype": options.dtype,
        "backend": backend(),
        "sequences in the batch": options.batch_size,
        "tokens of a prompt": options.input_len,
        "decode forwards of a round": options.decode_steps,
        "rank r": options.rank,
        "rounds": options.rounds,
    }


def _details(options: CollectivesOptions, system: ServedSystem) -> dict[str, Value]:
    shape = system.adapter(options.rank, options.tp)
    details: dict[str, Value] = {"flags": " ".join(system.flags)}
    if shape is not None:
        details |= {"rank": shape.rank, "blocks": shape.nblocks or 1}
    return details
