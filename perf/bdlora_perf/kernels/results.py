"""The report of a measurement: `raw.json` as `bdlora_perf.report` shows it."""

import itertools
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bdlora_perf.report.machine import describe_machine
from bdlora_perf.report.schema import Failure, Machine, Metric, Report, Sample, System
from bdlora_sglang.errors import BDLoRAError

METRICS = {
    "time_us": Metric(label="Time of a layer's LoRA", unit="us", better="lower"),
    "gb_per_s": Metric(label="Bandwidth", unit="GB/s", better="higher"),
    "tflop_per_s": Metric(label="Arithmetic", unit="TFLOP/s", better="higher"),
    "share_of_ceiling": Metric(label="Share of a large copy's bandwidth", unit="", better="higher"),
}
LABELS = {
    "bdlora": "BD-LoRA's kernels",
    "csgmv": "SGLang csgmv (default blocks where it has none tuned)",
    "triton": "SGLang triton",
    "triton_v2": "SGLang triton_v2",
    "flashinfer": "FlashInfer segment GEMM",
    "cublas_loop": "cuBLAS loop",
    "copy": "device copy of as many bytes",
    "base": "base layer alone",
    "bdlora_with_base": "base layer, then BD-LoRA's kernels",
    "bdlora_beside_base": "base layer with BD-LoRA's shrink beside it",
    "csgmv_with_base": "base layer, then SGLang csgmv",
    "triton_with_base": "base layer, then SGLang triton",
    "triton_v2_with_base": "base layer and SGLang triton_v2, by its plan",
}
MATCHED = {"r2": "plain LoRA, half the BD rank", "r4": "plain LoRA, a quarter of the BD rank"}
BASELINES = ("csgmv", "triton", "triton_v2")


def load_raw(folder: Path) -> dict[str, Any]:
    """Read ``raw.json``; raises `BDLoRAError` where there is none."""
    path = folder / "raw.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise BDLoRAError(f"{path}: found {error}, expected the raw figures of a measurement") from error
    return found


def make_report(raw: Mapping[str, Any]) -> Report:
    """The report of the raw figures of `bdlora_perf.kernels.measure`."""
    names = list(dict.fromkeys(name for case in raw["cases"] for name in case["systems"]))
    return Report(
        kind="kernels",
        title="LoRA kernels on one GPU",
        command=raw["command"],
        started=raw["started"],
        seconds=raw["seconds"],
        seed=0,
        # Raw figures of before the field was there say nothing of their machine but the GPU.
        machine=Machine.model_validate(raw["host"]) if "host" in raw else describe_machine(),
        settings={**raw["machine"], **raw.get("ceilings", {})},
        systems={name: System(label=label(name)) for name in names},
        metrics=METRICS,
        baselines=tuple(name for name in BASELINES if name in names),
        samples=tuple(sample for case in raw["cases"] for sample in _samples(case, raw.get("ceilings", {}))),
        failures=tuple(
            Failure(system=name, point=case["point"], message=system["failure"])
            for case in raw["cases"]
            for name, system in case["systems"].items()
            if "failure" in system
        ),
        notes=tuple(_notes(raw)),
    )


def label(name: str) -> str:
    """Of a system, in words."""
    contender, _, suffix = name.rpartition("_")
    return f"{LABELS[contender]}, {MATCHED[suffix]}" if suffix in MATCHED else LABELS[name]


def _samples(case: Mapping[str, Any], ceilings: Mapping[str, float]) -> Iterator[Sample]:
    """Bandwidth and arithmetic count what the case needs at least, whatever the contender moves."""
    for name, system in case["systems"].items():
        for number, time_us in enumerate(system.get("times_us", ())):
            gb_per_s = case["floor_bytes"] / time_us / 1e3
            metrics = {
                "time_us": time_us,
                "gb_per_s": gb_per_s,
                "tflop_per_s": case["floating_point_operations"] / time_us / 1e6,
                "share_of_ceiling": gb_per_s / ceilings["copy_gb_per_s"],
            }
            yield Sample(system=name, point=case["point"], round=number, metrics=metrics)


def _notes(raw: Mapping[str, Any]) -> Iterator[str]:
    """What holds over all cases: speed-ups over the best of SGLang's, as geometric means."""
    cases = raw["cases"]
    for phase, suffix in itertools.product(("decode", "prefill"), ("", *MATCHED)):
        rivals = [f"{name}_{suffix}" if suffix else name for name in BASELINES]
        against = f"serving {MATCHED[suffix]}" if suffix else "on the same factors"
        ratios = [_speed_up(case, rivals, "bdlora") for case in cases if case["point"]["phase"] == phase]
        yield from _mean(ratios, f"{phase}: {{}} times as fast as the best of SGLang's {against}", digits=2)
    ratios = [_speed_up(case, ["bdlora_with_base"], "bdlora_beside_base") for case in cases]
    yield from _mean(ratios, "decode: a layer is {} times as fast with the shrink beside the base", digits=3)
    systems = [system for case in cases for system in case["systems"].values()]
    if not any(system.get("times_us") for system in systems):
        worst = max(system["error_units"] for system in systems if "error_units" in system)
        yield f"Nothing was timed. Largest error: {worst:.2f} roundings of the type."


def _speed_up(case: Mapping[str, Any], slow: Iterable[str], fast: str) -> float | None:
    """The median time of the best of ``slow`` over that of ``fast``; None where one side was not timed."""
    timed = {name: times for name, system in case["systems"].items() if (times := system.get("times_us"))}
    medians = [statistics.median(timed[name]) for name in slow if name in timed]
    return float(min(medians) / statistics.median(timed[fast])) if medians and fast in timed else None


def _mean(ratios: Iterable[float | None], claim: str, digits: int) -> Iterator[str]:
    found = [ratio for ratio in ratios if ratio is not None]
    if found:
        mean, low, high = (f"{x:.{digits}f}" for x in (statistics.geometric_mean(found), min(found), max(found)))
        yield f"{claim.format(mean)} (geometric mean of {len(found)} cases, {low} to {high})."
