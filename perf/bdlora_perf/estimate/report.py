"""An estimate as a report: every system, phase and rank, with the paper's headlines and all sources in the notes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from bdlora_perf.estimate.hardware import GPU, find_gpu, sources
from bdlora_perf.estimate.lora_cost import BASE, Serving, csgmv, replicated, s_lora
from bdlora_perf.estimate.model_shape import load_shape
from bdlora_perf.estimate.paper import CAVEATS, compare_headlines
from bdlora_perf.estimate.recommend import Candidate, candidates
from bdlora_perf.estimate.roofline import Deployment, Requests, Step
from bdlora_perf.estimate.traffic import Traffic
from bdlora_perf.report.run import Run
from bdlora_perf.report.schema import Metric, Point, Report, Sample, System, Value
from bdlora_sglang.errors import BDLoRAError

BASELINES = ("s-lora", "replicated")
ASSUMPTIONS_NOTE = (
    "Ranges are over assumptions on LoRA's kernels: at the speed of memory or arithmetic; started as vLLM starts them, "
    "4 zero fills, 7 shrinks and 7 expands a layer; adapters read again for every token of a decode step; and a host "
    "that prepares a step no faster than so, while the GPU runs the one before. The figures of steps are those of the "
    "first."
)
METRICS = {
    "latency_ms": Metric(label="time of one step", unit="ms", better="lower"),
    "ttft_ms": Metric(label="time to first token, all prompts at once", unit="ms", better="lower"),
    "tpot_ms": Metric(label="time per output token", unit="ms", better="lower"),
    "e2e_latency_ms": Metric(label="end-to-end latency", unit="ms", better="lower"),
    "output_throughput": Metric(label="output throughput", unit="token/s", better="higher"),
    "breakdown_weights_ms": Metric(label="base weights", unit="ms", better="lower"),
    "breakdown_attention_ms": Metric(label="attention", unit="ms", better="lower"),
    "breakdown_collectives_ms": Metric(label="base collectives", unit="ms", better="lower"),
    "breakdown_launches_ms": Metric(label="base kernel starts", unit="ms", better="lower"),
    "breakdown_lora_ms": Metric(label="LoRA kernels", unit="ms", better="lower"),
    "breakdown_lora_collectives_ms": Metric(label="LoRA collectives", unit="ms", better="lower"),
    "breakdown_lora_launches_ms": Metric(label="LoRA kernel starts", unit="ms", better="lower"),
    "breakdown_waiting_ms": Metric(label="waiting for the host", unit="ms", better="lower"),
    "memory_weights": Metric(label="base weights", unit="GiB per GPU"),
    "memory_adapters": Metric(label="all adapters", unit="GiB per GPU", better="lower"),
    "memory_kv_cache": Metric(label="KV cache", unit="GiB per GPU"),
}


@dataclass(frozen=True)
class Estimate:
    """Everything that is printed and reported, beside the paper's headlines.

    ``systems`` that fit, by the rank of LoRA that they serve or replace; all ``candidates`` of every such rank.
    """

    deployment: Deployment
    traffic: Traffic
    systems: Mapping[int, Sequence[tuple[Serving, Requests]]]
    candidates: Mapping[int, Sequence[Candidate]]


def make_estimate(
    model: str, gpu: str, tp: int, traffic: Traffic, ranks: Sequence[int], blocks: Sequence[int] = ()
) -> Estimate:
    """Estimate ``model`` on ``tp`` GPUs, for LoRA of each of ``ranks`` and BD-LoRA with each count of ``blocks``.

    Raises:
        BDLoRAError: an unknown model or GPU, a rank below 1, a TP degree or block count that does not divide evenly, or
            weights and KV cache that do not fit the GPU.
    """
    deployment = Deployment(load_shape(model), find_gpu(gpu), tp)
    needed = sum(deployment.memory_bytes(BASE, traffic).values())
    if needed > deployment.gpu.memory_bytes:
        raise BDLoRAError(
            f"--gpu {gpu} --tp {tp}: found {needed / 1e9:.0f} GB of weights and KV cache per GPU, expected at most "
            f"{deployment.gpu.memory.value:.0f} GB"
        )
    if not ranks or min(ranks) < 1:
        raise BDLoRAError(f"--rank: found {', '.join(map(str, ranks)) or 'none'}, expected at least 1")
    # By default half as many blocks as ranks, as many, and twice as many.
    counts = sorted(set(blocks) or {max(1, tp // 2), tp, 2 * tp})
    systems, found = {}, {}
    for rank in sorted(set(ranks)):
        found[rank] = candidates(deployment, traffic, rank, counts)
        served = (BASE, *(c.serving for c in found[rank]), replicated(rank), csgmv(rank), s_lora(rank))
        # What does not fit has no throughput.
        systems[rank] = [
            (each, deployment.requests(each, traffic)) for each in served if deployment.fits(each, traffic)
        ]
    return Estimate(deployment, traffic, systems, found)


def make_report(made: Estimate, run: Run) -> Report:
    """The report of an estimate that ``run`` says the command of."""
    deployment, traffic = made.deployment, made.traffic
    systems = _systems(made)
    return Report(
        **run.head(),
        kind="estimate",
        title=f"Estimate: {deployment.shape.name} on {deployment.tp} x {deployment.gpu.label}",
        estimate=True,
        settings={
            "model": deployment.shape.name,
            "gpu": deployment.gpu.label,
            "link": deployment.gpu.link.name,
            "tp": deployment.tp,
            "input_len": traffic.input_len,
            "output_len": traffic.output_len,
            "adapters": traffic.adapters,
            "distribution": traffic.distribution.value,
        },
        systems=systems,
        metrics=METRICS,
        baselines=tuple(name for name in BASELINES if name in systems),
        samples=tuple(_samples(made)),
        notes=tuple(_notes(made)),
    )


def source_lines(gpu: GPU) -> list[str]:
    """One line for every constant, with its source."""
    return [f"{name}: {constant.value:g} {constant.unit} ({constant.source})" for name, constant in sources(gpu)]


def _notes(made: Estimate) -> list[str]:
    """What is suggested, how far the paper is off, and where every constant is from."""
    found = [candidate for candidates in made.candidates.values() for candidate in candidates]
    return [
        *(candidate.suggestion() for candidate in found if candidate.purpose),
        *(
            f"{c.serving.label} does not fit with {made.traffic.adapters} adapters of rank {c.serving.rank}: no "
            "throughput."
            for c in found
            if not c.fits
        ),
        *(comparison.describe() for comparison in compare_headlines()),
        ASSUMPTIONS_NOTE,
        *CAVEATS,
        *source_lines(made.deployment.gpu),
    ]


def _systems(made: Estimate) -> dict[str, System]:
    shape, tp = made.deployment.shape, made.deployment.tp
    details: dict[tuple[str, str], dict[str, Value]] = {}
    for rank, systems in made.systems.items():
        for serving, _ in systems:
            found = details.setdefault((serving.name, serving.label), {})
            if serving.rank:
                found[f"parameters at r = {rank}"] = serving.parameters(shape)
                mib = serving.adapter_bytes(shape, tp) / 2**20
                found[f"MiB per adapter and GPU at r = {rank}"] = round(mib, 1)
    return {name: System(label=label, details=found) for (name, label), found in details.items()}


def _samples(made: Estimate) -> Iterator[Sample]:
    for rank, systems in made.systems.items():
        for serving, requests in systems:
            memory = made.deployment.memory_bytes(serving, made.traffic)
            whole = {
                "ttft_ms": requests.ttft * 1e3,
                "tpot_ms": requests.decode.seconds * 1e3,
                "e2e_latency_ms": requests.e2e_latency * 1e3,
                "output_throughput": requests.output_throughput,
                **{f"memory_{name}": size / 2**30 for name, size in memory.items()},
            }
            phases = {"prefill": _step(requests.prefill), "decode": _step(requests.decode), "request": whole}
            for phase, metrics in phases.items():
                point: Point = {"phase": phase, "concurrency": made.traffic.concurrency, "rank": rank}
                yield Sample(system=serving.name, point=point, round=0, metrics=metrics)


def _step(step: Step) -> dict[str, float]:
    parts = {f"breakdown_{name}_ms": seconds * 1e3 for name, seconds in asdict(step).items()}
    return {"latency_ms": step.seconds * 1e3, **parts}
