"""The collectives of running servers: started, profiled and counted, system by system."""

import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bdlora_perf.collectives.count import Collective, traffic_elements
from bdlora_perf.collectives.formulas import Batch, added_by_lora, agree
from bdlora_perf.collectives.forwards import PARTS, Forward, forwards
from bdlora_perf.collectives.timing import Message, backend, time_collectives
from bdlora_perf.collectives.trace import read_traces
from bdlora_perf.report.run import Run
from bdlora_perf.report.schema import Metric, Report, Sample, System, Value
from bdlora_perf.serve.adapters import MadeAdapter, adapter_flags, matched_adapter
from bdlora_perf.serve.servers import Server, adapter_names, send, start_server, warm_up
from bdlora_perf.serve.systems import ServedSystem
from bdlora_sglang.errors import BDLoRAError

# Sizes for the curve of time against size, beside those that were counted: 256 B to 4 MiB.
_CURVE = tuple(2**exponent for exponent in range(8, 23, 2))
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

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


def measure_collectives(options: CollectivesOptions, doing: Callable[[str], None]) -> Report:
    """Count the collectives of every system, and time each size that was seen; ``doing`` is told what comes next.

    Raises:
        BDLoRAError: a server does not start or answer, with the end of its log.
    """
    run = Run(options.command, options.seed)
    counted: list[Sample] = []
    per_forward: dict[tuple[str, str], Counter[Collective]] = {}
    for system, round_, found in _profile(options, doing):
        for phase in ("prefill", "decode"):
            alike = [forward for rank in found for forward in rank if forward.phase == phase]
            collectives = _same_in_all(alike, system, phase)
            per_forward[system.name, phase] = collectives
            counted += _count_samples(options, system.name, phase, round_, collectives)
            counted.append(_time_sample(options, system.name, phase, round_, alike))
    doing("timing collectives alone")
    timed = _time_samples(options, per_forward)
    operations = dict.fromkeys(sample.system for sample in timed)
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
        samples=(*counted, *timed),
        notes=tuple(_notes(options, per_forward)),
    )


def _profile(
    options: CollectivesOptions, doing: Callable[[str], None]
) -> Iterator[tuple[ServedSystem, int, list[list[Forward]]]]:
    """The forwards of every rank, for each system and round."""
    for system in options.systems:
        doing(f"{system.name}: starting")
        server = start_server(system.name, _flags(options, system), options.work / "logs")
        try:
            server.wait_until_healthy()
            names = adapter_names(server)
            warm_up(server, names)
            for round_ in range(1, options.rounds + 1):
                doing(f"{system.name}: round {round_}")
                yield system, round_, _profile_batch(options, server, names, round_)
        finally:
            server.stop()


def _profile_batch(
    options: CollectivesOptions, server: Server, names: Sequence[str], round_: int
) -> list[list[Forward]]:
    """One batch of requests, each with an adapter of its own where there are any; the forwards by rank."""
    vocabulary = range(3, 250)
    prompts = [
        [
            vocabulary[(round_ * 131 + sequence * 17 + position * 7) % len(vocabulary)]
            for position in range(options.input_len)
        ]
        for sequence in range(options.batch_size)
    ]
    with tempfile.TemporaryDirectory() as folder:
        activities = ["CPU", "GPU"] if backend() == "nccl" else ["CPU"]
        profiler = {"output_dir": folder, "activities": activities, "record_shapes": True, "with_stack": False}
        send("POST", f"{server.url}/start_profile", json=profiler)
        request: dict[str, object] = {
            "input_ids": prompts,
            "sampling_params": {"temperature": 0, "max_new_tokens": options.decode_steps + 1, "ignore_eos": True},
        }
        if names:
            request["lora_path"] = [names[i % len(names)] for i in range(options.batch_size)]
        send("POST", f"{server.url}/generate", json=request)
        send("POST", f"{server.url}/stop_profile")
        traces = read_traces(Path(folder))
    return [forwards(traces[rank]) for rank in sorted(traces)]


def _flags(options: CollectivesOptions, system: ServedSystem) -> list[str]:
    flags = ["--model", options.model, "--tp", str(options.tp), "--dtype", options.dtype, *system.flags]
    adapter = _adapter(options, system)
    if adapter is not None:
        flags += adapter_flags(adapter, options.batch_size)
    return [*flags, *options.server_flags]


def _adapter(options: CollectivesOptions, system: ServedSystem) -> MadeAdapter | None:
    shape = system.adapter(options.rank, options.tp)
    return None if shape is None else matched_adapter(options.work, options.model, shape, options.seed)


def _same_in_all(alike: Sequence[Forward], system: ServedSystem, phase: str) -> Counter[Collective]:
    """The collectives of a forward: the same in every forward of a phase and on every rank, or something is wrong."""
    kinds = {tuple(sorted(forward.collectives.items())) for forward in alike}
    if len(kinds) != 1:
        raise BDLoRAError(
            f"{system.name}: found {len(kinds)} different sets of collectives in {len(alike)} {phase} forwards, "
            "expected one: the batch was split, or another client used the server"
        )
    return alike[0].collectives


def _point(options: CollectivesOptions, phase: str) -> dict[str, Value]:
    tokens = options.batch_size * (options.input_len if phase == "prefill" else 1)
    return {"phase": phase, "tokens": tokens, "rank": options.rank, "tp": options.tp}


def _count_samples(
    options: CollectivesOptions, system: str, phase: str, round_: int, collectives: Counter[Collective]
) -> Iterator[Sample]:
    for operation in ("all_reduce", "all_gather"):
        own = {collective: count for collective, count in collectives.items() if collective.operation == operation}
        metrics: dict[str, float] = {"collectives_per_forward": sum(own.values())}
        if all(collective.shape is not None for collective in own):
            traffic = sum(traffic_elements(collective, options.tp) * count for collective, count in own.items())
            metrics["bytes_per_forward"] = traffic * _ITEM_BYTES[options.dtype]
        point = {**_point(options, phase), "operation": operation}
        yield Sample(system=system, point=point, round=round_, metrics=metrics)


def _time_sample(options: CollectivesOptions, system: str, phase: str, round_: int, alike: Sequence[Forward]) -> Sample:
    """Medians over the ranks and forwards of one round; the parts are shares of the median forward."""
    milliseconds = statistics.median(forward.milliseconds for forward in alike)
    total = sum(forward.milliseconds for forward in alike)
    shares = {part: sum(forward.parts[part] for forward in alike) / total for part in PARTS}
    return Sample(
        system=system,
        point=_point(options, phase),
        round=round_,
        metrics={
            "forward_ms": milliseconds,
            **{f"breakdown_{part}_ms": share * milliseconds for part, share in shares.items()},
        },
    )


def _time_samples(
    options: CollectivesOptions, per_forward: Mapping[tuple[str, str], Counter[Collective]]
) -> list[Sample]:
    seen = {
        Message(collective.operation, collective.elements * _ITEM_BYTES[options.dtype])
        for collectives in per_forward.values()
        for collective in collectives
        if collective.shape is not None
    }
    curve = {Message(operation, size) for operation in ("all_reduce", "all_gather") for size in _CURVE}
    messages = sorted(seen | curve, key=lambda message: (message.operation, message.num_bytes))
    if options.tp == 1:
        return []
    return [
        Sample(
            system=timing.message.operation,
            point={"bytes": timing.message.num_bytes, "tp": options.tp},
            round=timing.round,
            metrics={"time_us": timing.microseconds},
        )
        for timing in time_collectives(messages, options.tp, options.rounds, options.seed)
    ]


def _notes(options: CollectivesOptions, per_forward: Mapping[tuple[str, str], Counter[Collective]]) -> Iterator[str]:
    num_layers = _num_layers(options.model)
    for system in options.systems:
        shape = system.adapter(options.rank, options.tp)
        for phase in ("prefill", "decode"):
            base = per_forward.get(("base", phase))
            if shape is None or base is None:
                continue
            tokens = options.batch_size * (options.input_len if phase == "prefill" else 1)
            sharded = system.name == "lora-fully-sharded"
            expected = added_by_lora(sharded, Batch(tokens, shape.rank), num_layers, options.tp)
            added = per_forward[system.name, phase] - base
            verdict = "as the formula says" if agree(added, expected) else f"but the formula says {expected.total()}"
            yield f"{system.label}, {phase}: LoRA adds {added.total()} collectives to the base model's, {verdict}."
    yield (
        "Times of forwards were taken under the profiler, which slows small operations down, one system after the "
        "other: they show where time goes, and `bdlora perf serve` compares systems. Bytes are what a rank receives in "
        "a ring."
    )
    if backend() != "nccl":
        yield f"{backend()} on a CPU is not NVLink: these times say nothing about a GPU's collectives."


def _num_layers(model: str) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(model).get_text_config().num_hidden_layers)


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
