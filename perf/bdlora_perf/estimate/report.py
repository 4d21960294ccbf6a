"""An estimate as a report: every system, phase and rank, with the paper's headlines and all sources in the notes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timezone

from bdlora_perf.estimate.hardware import GPU, find_gpu, sources
from bdlora_perf.estimate.lora_cost import BASE, Serving, adapter_bytes, csgmv, replicated, s_lora
from bdlora_perf.estimate.model_shape import load_shape
from bdlora_perf.estimate.paper import ASSUMED, KNOWN, LACKING, Comparison, compare_headlines
from bdlora_perf.estimate.recommend import Candidate, candidates, default_blocks
from bdlora_perf.estimate.roofline import Deployment, Requests, Step
from bdlora_perf.estimate.traffic import Traffic
from bdlora_perf.report.machine import describe_machine
from bdlora_perf.report.schema import Metric, Report, Sample, System, Value
from bdlora_sglang.errors import BDLoRAError

BASELINES = ("s-lora", "replicated")
ASSUMPTIONS_NOTE = (
    "Ranges are over assumptions on LoRA's kernels: at the speed of memory or arithmetic; started as vLLM starts them, "
    "4 zero fills, 7 shrinks and 7 expands a layer; adapters read again for every token of a decode step; and a host "
    "that prepares a step no faster than so, while the GPU runs the one before. The figures of steps are those of the "
    "first."
)
_PARTS = {
    "weights": "base weights",
    "attention": "attention",
    "collectives": "base collectives",
    "launches": "base kernel starts",
    "lora": "LoRA kernels",
    "lora_collectives": "LoRA collectives",
    "lora_launches": "LoRA kernel starts",
    "waiting": "waiting for the host",
}
METRICS = {
    "latency_ms": Metric(label="time of one step", unit="ms", better="lower"),
    "ttft_ms": Metric(label="time to first token, all prompts at once", unit="ms", better="lower"),
    "tpot_ms": Metric(label="time per output token", unit="ms", better="lower"),
    "e2e_latency_ms": Metric(label="end-to-end latency", unit="ms", better="lower"),
    "output_throughput": Metric(label="output throughput", unit="token/s", better="higher"),
    **{f"breakdown_{name}_ms": Metric(label=label, unit="ms", better="lower") for name, label in _PARTS.items()},
    "memory_weights": Metric(label="base weights", unit="GiB per GPU"),
    "memory_adapters": Metric(label="all adapters", unit="GiB per GPU", better="lower"),
    "memory_kv_cache": Metric(label="KV cache", unit="GiB per GPU"),
}


@dataclass(frozen=True)
class RankEstimate:
    """All ways of serving LoRA of one rank, and BD-LoRA in its place."""

    rank: int
    systems: tuple[tuple[Serving, Requests], ...]
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Estimate:
    """Everything that is printed and reported."""

    deployment: Deployment
    traffic: Traffic
    ranks: tuple[RankEstimate, ...]
    headlines: tuple[Comparison, ...]


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
    estimates = []
    for rank in sorted(set(ranks)):
        found = candidates(deployment, traffic, rank, sorted(set(blocks)) or default_blocks(tp))
        systems = (BASE, *(c.serving for c in found), replicated(rank), csgmv(rank), s_lora(rank))
        # What does not fit has no throughput.
        fitting = [serving for serving in systems if deployment.fits(serving, traffic)]
        timed = tuple((serving, deployment.requests(serving, traffic)) for serving in fitting)
        estimates.append(RankEstimate(rank, timed, found))
    return Estimate(deployment, traffic, tuple(estimates), compare_headlines())


def estimate(
    model: str, gpu: str, tp: int, traffic: Traffic, ranks: Sequence[int], blocks: Sequence[int] = (), command: str = ""
) -> Report:
    """The report of `make_estimate`, which see; ``command`` is what the user typed."""
    started = time.perf_counter()
    made = make_estimate(model, gpu, tp, traffic, ranks, blocks)
    return make_report(made, command, time.perf_counter() - started)


def make_report(made: Estimate, command: str, seconds: float) -> Report:
    """The report of an estimate that took ``seconds``."""
    deployment, traffic = made.deployment, made.traffic
    title = f"Estimate: {deployment.shape.name} on {deployment.tp} x {deployment.gpu.label}"
    return Report(
        kind="estimate",
        title=title,
        estimate=True,
        command=command,
        started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=seconds,
        seed=0,
        machine=describe_machine(),
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
        systems=_systems(made),
        metrics=METRICS,
        baselines=tuple(name for name in BASELINES if any(name == s.name for e in made.ranks for s, _ in e.systems)),
        samples=tuple(_samples(made)),
        notes=tuple(notes(made)),
    )


def notes(made: Estimate) -> list[str]:
    """What is suggested, how far the paper is off, and where every constant is from."""
    lines = [
        suggestion(candidate)
        for estimated in made.ranks
        for candidate in estimated.candidates
        if candidate.purpose is not None
    ]
    lines += [
        f"{c.serving.label} does not fit with {made.traffic.adapters} adapters of rank {c.serving.rank}: no throughput."
        for estimated in made.ranks
        for c in estimated.candidates
        if not c.fits
    ]
    lines += [f"{comparison.describe()}." for comparison in made.headlines]
    lines.append(ASSUMPTIONS_NOTE)
    lines += [KNOWN, ASSUMED, LACKING]
    return lines + source_lines(made.deployment.gpu)


def source_lines(gpu: GPU) -> list[str]:
    """One line for every constant, with its source."""
    return [f"{name}: {constant.value:g} {constant.unit} ({constant.source})" for name, constant in sources(gpu)]


def suggestion(candidate: Candidate) -> str:
    """A suggested candidate in one sentence."""
    assert candidate.purpose is not None, candidate
    return (
        f"Suggested for {candidate.purpose.value} in place of LoRA r = {candidate.lora_rank}: "
        f"{candidate.serving.label}, rank {candidate.serving.rank} ({candidate.reason})."
    )


def _systems(made: Estimate) -> dict[str, System]:
    shape, tp = made.deployment.shape, made.deployment.tp
    labels: dict[str, str] = {}
    details: dict[str, dict[str, Value]] = {}
    for estimated in made.ranks:
        for serving, _ in estimated.systems:
            labels[serving.name] = serving.label
            found = details.setdefault(serving.name, {})
            if serving.rank:
                found[f"parameters at r = {estimated.rank}"] = serving.parameters(shape)
                mib = adapter_bytes(shape, serving, tp) / 2**20
                found[f"MiB per adapter and GPU at r = {estimated.rank}"] = round(mib, 1)
    return {name: System(label=label, details=details[name]) for name, label in labels.items()}


def _samples(made: Estimate) -> list[Sample]:
    samples = []
    for estimated in made.ranks:
        dimensions: dict[str, Value] = {"concurrency": made.traffic.concurrency, "rank": estimated.rank}
        for serving, requests in estimated.systems:
            memory = made.deployment.memory_bytes(serving, made.traffic)
            whole = {
                "ttft_ms": requests.ttft * 1e3,
                "tpot_ms": requests.tpot * 1e3,
                "e2e_latency_ms": requests.e2e_latency * 1e3,
                "output_throughput": requests.output_throughput,
                **{f"memory_{name}": size / 2**30 for name, size in memory.items()},
            }
            phases = {"prefill": _step(requests.prefill), "decode": _step(requests.decode), "request": whole}
            for phase, metrics in phases.items():
                point = {"phase": phase, **dimensions}
                samples.append(Sample(system=serving.name, point=point, round=0, metrics=metrics))
    return samples


def _step(step: Step) -> dict[str, float]:
    parts = {f"breakdown_{field.name}_ms": getattr(step, field.name) * 1e3 for field in fields(step)}
    return {"latency_ms": step.seconds * 1e3, **parts}
