"""A seeded report of every kind, as large and as crooked as a real one."""

import math
import random
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import get_args

from bdlora_perf.report.schema import Failure, Kind, Machine, Metric, Report, Sample, System, Value

KINDS: tuple[Kind, ...] = get_args(Kind)
MACHINE = Machine(
    processor="Example <CPU> & Co. 3 GHz",
    cores=16,
    memory_gib=125.8,
    gpus=("Example GPU",) * 8,
    system="Linux x86_64, Python 3.11.2",
    versions={"bdlora-sglang": "0.1.0", "sglang": "0.5.23", "torch": "2.14.1"},
)
Figures = Callable[[str, Mapping[str, Value]], dict[str, float]]


def make_report(kind: Kind, **changes: object) -> Report:
    """The sample report of this kind, with some fields changed."""
    report = _MAKERS[kind]()
    return Report.model_validate({**report.model_dump(), **changes})


def _report(kind: Kind, systems: dict[str, System], metrics: dict[str, Metric], **fields: object) -> Report:
    head = {
        "kind": kind,
        "title": f"Sample of bdlora perf {kind}: BD-LoRA | LoRA <b>*bold*</b> & $math$",
        "command": f"bdlora perf {kind} --model synthetic --tp 8 --output 'out|put'",
        "started": "2026-01-02T03:04:05Z",
        "seconds": 1234.56,
        "seed": 7,
        "machine": MACHINE,
        "settings": {"model": "Llama-3.1-70B", "dtype": "bfloat16", "warm_up": True, "num_prompts": 2048},
        "systems": systems,
        "metrics": metrics,
        "notes": ("Ratios are of neighbours.", "Odd characters: | * _ ` < > & [x](y) # $1$."),
    }
    return Report.model_validate({**head, **fields})


def _samples(
    systems: Mapping[str, System], points: list[dict[str, Value]], rounds: int, figures: Figures, noise: float = 0.03
) -> Iterator[Sample]:
    rng = random.Random(0)
    for number, point in product(range(rounds), points):
        drift = rng.gauss(0, noise)  # shared by neighbours
        for system in systems:
            metrics = {
                name: value * math.exp(drift + rng.gauss(0, noise / 3))
                for name, value in figures(system, point).items()
            }
            if metrics:
                yield Sample(system=system, point=point, round=number, metrics=metrics)


def _grid(**dimensions: tuple[Value, ...]) -> list[dict[str, Value]]:
    return [dict(zip(dimensions, values, strict=True)) for values in product(*dimensions.values())]


_SERVED = {
    "base": 1.0,
    "bd_2r": 0.93,
    "bd_4r": 0.86,
    "plain": 0.8,
    "s_lora": 0.58,
    "sglang_csgmv": 0.7,
    "triton_v2": 0.74,
}


def _serve() -> Report:
    systems = {
        "base": System(label="Base model", details={"flags": "--tp 8"}),
        "bd_2r": System(
            label="BD-LoRA, rank 2r",
            details={
                "flags": "--tp 8 --lora-sharding communication-free --max-loras-per-batch 16",
                "rank": 128,
                "blocks": 8,
                "parameters": 1_234_567_890,
                "parameters_over_lora_r": 0.87,
            },
        ),
        "bd_4r": System(label="BD-LoRA, rank 4r", details={"rank": 256, "blocks": 8, "parameters_over_lora_r": 1.74}),
        "plain": System(label="Plain LoRA, communication-free", details={"rank": 64, "parameters_over_lora_r": 1.0}),
        "s_lora": System(label="Plain LoRA, fully sharded (S-LoRA)", details={"rank": 64}),
        "sglang_csgmv": System(label="SGLang csgmv", details={"rank": 64}),
        "triton_v2": System(label="SGLang triton_v2", details={"rank": 64}),
    }
    throughput = {"request": "req/s", "input": "tok/s", "output": "tok/s", "total": "tok/s"}
    metrics = {
        f"{name}_throughput": Metric(label=f"{name.title()} throughput", unit=unit, better="higher")
        for name, unit in throughput.items()
    }
    latencies = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e_latency": "E2E latency"}
    for (stem, label), prefix in product(latencies.items(), ("mean", "median", "p90", "p95", "p99")):
        metrics[f"{prefix}_{stem}_ms"] = Metric(label=f"{label}, {prefix}", unit="ms", better="lower")
    metrics["request_goodput"] = Metric(label="Goodput", unit="req/s", better="higher")
    metrics["completed"] = Metric(label="Completed requests", unit="")
    metrics["memory_lora_gib"] = Metric(label="LoRA memory pool", unit="GiB", better="lower")
    metrics["memory_weights_gib"] = Metric(label="Base weights", unit="GiB")
    tails = {"mean": 1.1, "median": 1.0, "p90": 1.7, "p95": 2.1, "p99": 3.4}

    def figures(system: str, point: Mapping[str, Value]) -> dict[str, float]:
        if system == "triton_v2" and point["distribution"] == "skewed":
            return {}  # the server that died
        load = float(str(point["concurrency"]))
        speed = _SERVED[system] * (1 if point["distribution"] == "uniform" else 0.95)
        rate = speed * 30 * load / (load + 12)
        found = {"request_throughput": rate, "input_throughput": rate * 512, "output_throughput": rate * 256}
        found |= {"total_throughput": rate * 768, "request_goodput": rate * 0.9, "completed": 2048.0}
        step = 1000 * load / rate / 280
        base = {"ttft": 8 * step, "tpot": step, "itl": step * 0.98, "e2e_latency": 265 * step}
        for (stem, value), (prefix, tail) in product(base.items(), tails.items()):
            found[f"{prefix}_{stem}_ms"] = value * tail
        lora = {"base": 0.0, "bd_2r": 1.1, "bd_4r": 2.2, "s_lora": 1.25}.get(system, 5.0)
        return found | {"memory_lora_gib": lora, "memory_weights_gib": 16.4}

    points = _grid(concurrency=(1, 8, 32, 128), adapters=(16,), distribution=("uniform", "skewed"))
    failure = Failure(
        system="triton_v2", point={"concurrency": 1, "distribution": "skewed"}, message="the server ended with code -9",
        log_tail="Traceback (most recent call last):\n  ```\n<script>alert(1)</script>\nKilled " + "x" * 300 + "\n",
    )  # fmt: skip
    return _report(
        "serve", systems, metrics, baselines=("s_lora", "base"), failures=(failure,),
        samples=tuple(_samples(systems, points, 3, figures)),
    )  # fmt: skip


def _collectives() -> Report:
    systems = {
        "base": System(label="Base model"),
        "bd": System(label="BD-LoRA", details={"rank": 128}),
        "s_lora": System(label="S-LoRA", details={"rank": 64}),
        "all_reduce": System(label="All-reduce"),
        "all_gather": System(label="All-gather"),
    }
    metrics = {
        "collectives_per_forward": Metric(label="Collectives a forward pass", unit="", better="lower"),
        "bytes_per_forward": Metric(label="Bytes a forward pass", unit="bytes", better="lower"),
        "time_us": Metric(label="Time", unit="µs", better="lower"),
    }
    counts = {("base", "all_reduce"): 160, ("bd", "all_reduce"): 160, ("s_lora", "all_reduce"): 320}
    counts["s_lora", "all_gather"] = 400

    def figures(system: str, point: Mapping[str, Value]) -> dict[str, float]:
        if "bytes" in point:
            alpha = {"all_reduce": 11.0, "all_gather": 8.0}.get(system)
            return {} if alpha is None else {"time_us": alpha + float(str(point["bytes"])) / 2e5}
        count = counts.get((system, str(point["operation"])), 0)
        size = 8192 if point["phase"] == "decode" else 8192 * 512
        return {"collectives_per_forward": count, "bytes_per_forward": count * size} if count else {}

    counted = _samples(
        systems, _grid(phase=("decode", "prefill"), operation=("all_reduce", "all_gather")), 1, figures, 0
    )
    timed = _samples(systems, _grid(bytes=tuple(2**i for i in range(10, 29, 2))), 5, figures)
    return _report("collectives", systems, metrics, samples=(*counted, *timed))


def _kernels() -> Report:
    labels = {
        "ours": "Ours", "csgmv": "SGLang csgmv, same factors", "triton": "SGLang triton, same factors",
        "triton_v2": "SGLang triton_v2, same factors", "csgmv_plain": "SGLang csgmv, plain LoRA",
        "triton_v2_plain": "SGLang triton_v2, plain LoRA", "flashinfer": "FlashInfer segment GEMM",
        "cublas": "cuBLAS loop", "copy": "Device copy (ceiling)",
    }  # fmt: skip
    slower = {name: 1 + 0.22 * i for i, name in enumerate(labels)} | {"copy": 0.6}
    systems = {name: System(label=label) for name, label in labels.items()}
    metrics = {
        "time_us": Metric(label="Time", unit="µs", better="lower"),
        "gb_per_s": Metric(label="Achieved bandwidth", unit="GB/s", better="higher"),
        "tflop_per_s": Metric(label="Achieved arithmetic", unit="TFLOP/s", better="higher"),
        "share_of_ceiling": Metric(label="Share of the ceiling", unit="", better="higher"),
    }
    width = {"qkv": 1.3, "o": 1.0, "gate_up": 2.4}

    def figures(system: str, point: Mapping[str, Value]) -> dict[str, float]:
        if system == "flashinfer" and point["phase"] == "decode":
            return {}
        tokens, adapters = float(str(point["tokens"])), float(str(point["adapters"]))
        if adapters > tokens:
            return {}
        work = width[str(point["layer"])] / float(str(point["tp"])) * (1 + adapters / 8 + tokens / 64)
        time = slower[system] * (4 + work * 3)
        return {
            "time_us": time,
            "gb_per_s": 900 * work / time,
            "tflop_per_s": 40 * work / time,
            "share_of_ceiling": work / time,
        }

    shared = {"model": ("Llama-3.1-70B",), "tp": (1, 8), "layer": tuple(width), "rank": (16,)}
    decode = _grid(**shared, phase=("decode",), tokens=(1, 8, 256), adapters=(1, 8))
    prefill = _grid(**shared, phase=("prefill",), tokens=(512, 2048, 8192), adapters=(8,))
    samples = _samples(systems, decode + prefill, 3, figures)
    return _report("kernels", systems, metrics, baselines=("csgmv", "triton_v2_plain"), samples=tuple(samples))


def _kernels_static() -> Report:
    systems = {"bdlora": System(label="BD-LoRA's kernels"), "triton_v2": System(label="SGLang triton_v2")}
    metrics = {
        "time_us": Metric(label="Model: as it is served", unit="us", better="lower"),
        "serial_us": Metric(label="Model: behind the base layers' products", unit="us", better="lower"),
        "requested": Metric(label="Bytes requested over bytes needed", unit="", better="lower"),
    }

    def figures(system: str, point: Mapping[str, Value]) -> dict[str, float]:
        work = 1 + float(str(point["rank"])) / 8 + float(str(point["tokens"])) / 64
        time = work if system == "bdlora" else 1.1 * work
        return {"time_us": time, "serial_us": time + 3, "requested": 1.5}

    shared = {"model": ("Llama-3.1-70B", "Llama-3.1-8B"), "rank": (2, 8, 64), "adapters": (8,)}
    points = _grid(**shared, phase=("decode",), tokens=(8, 256)) + _grid(**shared, phase=("prefill",), tokens=(2048,))
    samples = tuple(_samples(systems, points, 1, figures, 0))
    return _report("kernels-static", systems, metrics, estimate=True, baselines=("triton_v2",), samples=samples)


def _estimate() -> Report:
    parts = {"weights": 9.0, "kv_cache": 1.5, "lora": 0.8, "collectives": 2.0, "launches": 0.9}
    labels = {"base": "Base model", "bd_2r": "BD-LoRA, rank 2r", "replicated": "LoRA, replicated", "s_lora": "S-LoRA"}
    cost = {"base": (0.0, 1.0), "bd_2r": (1.0, 1.0), "replicated": (4.0, 1.0), "s_lora": (1.2, 2.8)}
    systems = {name: System(label=label, details={"rank": 64}) for name, label in labels.items()}
    metrics = {"latency_ms": Metric(label="Time of a step", unit="ms", better="lower")}
    metrics |= {f"breakdown_{n}_ms": Metric(label=n.replace("_", " "), unit="ms", better="lower") for n in parts}
    metrics |= {f"memory_{n}_gib": Metric(label=n, unit="GiB", better="lower") for n in ("weights", "adapters")}

    def figures(system: str, point: Mapping[str, Value]) -> dict[str, float]:
        load = float(str(point["concurrency"])) ** 0.5
        lora, collectives = cost[system]
        times = parts | {"lora": parts["lora"] * lora * load, "collectives": parts["collectives"] * collectives}
        scale = 1 if point["phase"] == "decode" else 8
        found = {f"breakdown_{name}_ms": scale * time for name, time in times.items()}
        memory = {"memory_weights_gib": 16.4, "memory_adapters_gib": 1.1 * lora}
        return {"latency_ms": sum(found.values()), **found, **memory}

    points = _grid(phase=("decode", "prefill"), concurrency=(1, 32))
    samples = tuple(_samples(systems, points, 1, figures, 0))
    return _report("estimate", systems, metrics, estimate=True, baselines=("s_lora",), samples=samples)


def _engine() -> Report:
    labels = {"base": "Base model, no LoRA", "bd-2r": "BD-LoRA, rank 2r"}
    labels |= {f"{name}-before": f"{label}, before" for name, label in labels.items()}
    slower = dict(zip(labels, (1.0, 1.1, 4.0, 5.0), strict=True))
    systems = {name: System(label=label, details={"checkout": "this one"}) for name, label in labels.items()}
    metrics = {
        "decode_ms": Metric(label="Decode step", unit="ms", better="lower"),
        "prefill_ms": Metric(label="Prefill", unit="ms", better="lower"),
        "decode_bandwidth_gbs": Metric(label="Effective bandwidth of a decode step", unit="GB/s", better="higher"),
    }

    def figures(system: str, point: Mapping[str, Value]) -> dict[str, float]:
        tp, requests = float(str(point["tp"])), float(str(point["requests"]))
        time = slower[system] * (8 if point["dtype"] == "float32" else 5) * (2 + requests / 8) / tp
        if point["phase"] == "prefill":
            return {"prefill_ms": 3 * requests * time}
        return {"decode_ms": time, "decode_bandwidth_gbs": 160 / time}

    points = _grid(tp=(1, 2, 4), dtype=("float32", "bfloat16"), requests=(1, 4, 8, 32), phase=("decode", "prefill"))
    baselines = ("base-before", "bd-2r-before", "base")
    samples = tuple(_samples(systems, points, 5, figures))
    return _report("engine", systems, metrics, baselines=baselines, samples=samples)


def _swap() -> Report:
    systems = {"now": System(label="This checkout"), "before": System(label="Before")}
    slower = {"now": 1.0, "before": 6.0}
    names = {f"{which}_{what}_ms": what for what in ("load", "cold", "warm") for which in ("median", "p99")}
    metrics = {name: Metric(label=name, unit="ms", better="lower") for name in (*names, "gap_ms")}
    metrics["prepare_same_us"] = Metric(label="CPU time of a decode batch", unit="us", better="lower")

    def swapped(system: str, point: Mapping[str, Value]) -> dict[str, float]:
        time = slower[system] * float(str(point["rank"]))
        return {name: time * (2 if name.startswith("p99") else 1) for name in names} | {"gap_ms": 3 * time}

    def prepared(system: str, point: Mapping[str, Value]) -> dict[str, float]:
        return {"prepare_same_us": slower[system] * float(str(point["requests"]))}

    samples = (
        *_samples(systems, _grid(tp=(1, 2), rank=(8, 64)), 3, swapped),
        *_samples(systems, _grid(requests=(1, 32, 256)), 3, prepared),
    )
    return _report("swap", systems, metrics, baselines=("before",), samples=samples)


def _quality() -> Report:
    kinds = {
        "lora": ("LoRA", "LoRA"),
        "bd8-2r": ("BD-LoRA", "BD-LoRA, 8 blocks"),
        "bd8-4r": ("BD-LoRA", "BD-LoRA, 8 blocks"),
        "bd8-2r-peft": ("initial values", "BD-LoRA, 8 blocks, peft initial values"),
        "healed-8": ("conversion", "converted, healed, 8 blocks"),
    }
    systems = {
        name: System(label=f"Sample {name}", details={"kind": kind, "family": family})
        for name, (kind, family) in kinds.items()
    }
    metrics = {
        "loss": Metric(label="held-out loss", unit="nats", better="lower"),
        "perplexity": Metric(label="held-out perplexity", unit="", better="lower"),
        "accuracy": Metric(label="accuracy", unit="", better="higher"),
        "parameters": Metric(label="parameters", unit=""),
        "output_throughput": Metric(label="output throughput", unit="token/s"),
    }
    size = dict(zip(kinds, (1.0, 0.9, 1.8, 0.9, 0.9), strict=True))

    def figures(system: str, point: Mapping[str, Value]) -> dict[str, float]:
        parameters = size[system] * float(str(point["r"]))
        if system == "bd8-4r" and parameters < 5:
            return {}  # blocks do not divide the rank
        loss = (2 if point["task"] == "code" else 1) + 1 / parameters
        return {
            "loss": loss, "perplexity": math.exp(loss), "accuracy": 0.9 - 1 / parameters,
            "parameters": 1e5 * parameters, "output_throughput": 9000 / parameters,
        }  # fmt: skip

    samples = tuple(_samples(systems, _grid(task=("code", "json"), r=(2, 4, 8)), 5, figures, 0.01))
    # The size of an adapter does not vary from seed to seed.
    fixed = {"parameters": lambda s: round(1e5 * size[s.system] * float(str(s.point["r"])), 3)}
    exact = [s.model_copy(update={"metrics": {**s.metrics, **{n: f(s) for n, f in fixed.items()}}}) for s in samples]
    return _report("quality", systems, metrics, baselines=("lora",), samples=tuple(exact))


def _convert() -> Report:
    systems = {name: System(label=name) for name in ("lossless", "param_ratio 0.87", "dense SVD", "thin factors")}
    slower = dict(zip(systems, (1.0, 4.0, 80.0, 1.0), strict=True))
    metrics = {
        "seconds": Metric(label="Time", unit="s", better="lower"),
        "gb_per_s": Metric(label="Weights converted", unit="GB/s", better="higher"),
        "above_mib": Metric(label="Peak memory above the interpreter", unit="MiB", better="lower"),
    }
    alone = ("dense SVD", "thin factors")

    def figures(system: str, point: Mapping[str, Value]) -> dict[str, float]:
        if "module" in point:
            return {"seconds": slower[system]} if system in alone else {}
        size = float(str(point["billions_of_parameters"]))
        return {} if system in alone else {
            "seconds": size * slower[system], "gb_per_s": 1 / slower[system], "above_mib": 50 + size,
        }  # fmt: skip

    points = [*_grid(billions_of_parameters=(8, 70)), *_grid(module=("q_proj",))]
    return _report(
        "convert", systems, metrics, baselines=("dense SVD",), samples=tuple(_samples(systems, points, 3, figures))
    )


_MAKERS: Mapping[Kind, Callable[[], Report]] = {
    "serve": _serve,
    "collectives": _collectives,
    "kernels": _kernels,
    "kernels-static": _kernels_static,
    "estimate": _estimate,
    "engine": _engine,
    "swap": _swap,
    "quality": _quality,
    "convert": _convert,
}
