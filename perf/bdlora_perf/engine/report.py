"""The report of what was measured."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from bdlora_perf.engine.bandwidth import step_bytes
from bdlora_perf.engine.beside import LORA, Contender
from bdlora_perf.engine.plan import BASE, EngineOptions
from bdlora_perf.report.run import Run
from bdlora_perf.report.schema import Metric, Report, System, Value

METRICS: dict[str, Metric] = {
    "decode_ms": Metric(label="Decode step", unit="ms", better="lower"),
    "prefill_ms": Metric(label="Prefill", unit="ms", better="lower"),
    "decode_bandwidth_gbs": Metric(label="Effective bandwidth of a decode step", unit="GB/s", better="higher"),
}


@dataclass
class EngineRun(Run):
    """What there is so far.

    Attributes:
        copies: GB/s of a copy, by what copied.
        cores: cores and threads of the ranks, by whether the server is that of before, and TP degree.
        notes: what a reader should know of the figures.
    """

    copies: Mapping[str, float] = field(default_factory=dict)
    cores: dict[tuple[bool, int], str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def make_report(options: EngineOptions, measured: EngineRun) -> Report:
    contenders = options.contenders
    names = [contender.name for contender in contenders]
    return Report(
        kind="engine",
        title="Steps of the engine",
        **measured.head(),
        settings=_settings(options, measured),
        systems={
            contender.name: System(label=contender.label, details=_details(options, contender, measured))
            for contender in contenders
        },
        metrics=METRICS,
        # After over before for each, and BD-LoRA over the base model.
        baselines=tuple(name for name in ("base-before", "bd-2r-before", "base") if name in names),
        samples=tuple(measured.samples),
        failures=tuple(measured.failures),
        notes=(*_notes(options, measured),),
    )


def _settings(options: EngineOptions, measured: EngineRun) -> dict[str, Value]:
    return {
        "model": options.model,
        "parameters read by a step": round(step_bytes(options.shape, 1, 1)),
        "tokens of a prompt": options.input_len,
        "decode steps of a batch": options.decode_steps,
        "adapters": options.adapters,
        "rank r": options.rank,
        "rounds": options.rounds,
        **{f"copy, {what} (GB/s)": round(figure, 2) for what, figure in measured.copies.items()},
    }


def _details(options: EngineOptions, contender: Contender, measured: EngineRun) -> dict[str, Value]:
    details: dict[str, Value] = {"checkout": options.checkout(contender)}
    if contender.has_adapters:
        details |= {"rank": (LORA.rank_factor or 1) * options.rank, "blocks": "one a TP rank"}
    details["flags"] = " ".join([*options.common_flags, *options.server_flags])
    for (before, tp), cores in measured.cores.items():
        if before == contender.before:
            details[f"ranks at tp {tp}"] = cores
    return details


def _notes(options: EngineOptions, measured: EngineRun) -> list[str]:
    copies = ", ".join(f"{figure:.1f} GB/s by {what}" for what, figure in measured.copies.items())
    return [
        *measured.broken_off(options.num_turns, len(measured.samples) // 2),
        "The effective bandwidth counts the weights of all linear layers and of the vocabulary projection, once a "
        f"decode step. A copy of a large tensor on this machine, what it reads and what it writes: {copies}.",
        f"{BASE.label}: requests without an adapter, to the same server as those of {LORA.label}.",
        *measured.notes,
    ]
