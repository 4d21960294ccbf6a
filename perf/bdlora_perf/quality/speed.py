"""Throughput by adapter, for the trade-off: from a report of ``bdlora perf serve``, or estimated."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bdlora_perf.estimate.hardware import find_gpu
from bdlora_perf.estimate.model_shape import load_shape
from bdlora_perf.estimate.roofline import Deployment
from bdlora_perf.estimate.traffic import Traffic
from bdlora_perf.quality.systems import AdapterShape
from bdlora_perf.report.frame import Results
from bdlora_perf.report.schema import load_report
from bdlora_sglang.errors import BDLoRAError

# Plain LoRA is what the paper compares with: fully sharded, else as it was served.
_PLAIN = ("lora-fully-sharded", "lora")
_METRIC = "output_throughput"


def measured_speeds(path: Path) -> Mapping[AdapterShape, float]:
    """Output tokens a second by adapter: geometric means over the points of the medians over rounds.

    Raises:
        BDLoRAError: no report of ``perf serve``, or none of its systems says what adapters it served.
    """
    report = load_report(path)
    if report.kind != "serve":
        raise BDLoRAError(f"--speed {path}: found a report of perf {report.kind}, expected one of perf serve")
    rows = Results(report).rows(_METRIC)
    speeds: dict[AdapterShape, float] = {}
    for name in sorted(report.systems, key=lambda name: (*_PLAIN, name).index(name)):
        details = report.systems[name].details
        for r in (key.removesuffix(": rank") for key in details if key.endswith(": rank")):
            rank, nblocks = details[f"{r}: rank"], details.get(f"{r}: blocks")
            own = rows[rows.system == name]
            if "rank" in own:  # a sweep of one r has it in no point
                own = own[own["rank"] == int(r.removeprefix("r="))]
            if isinstance(rank, int) and isinstance(nblocks, int) and len(own):
                medians = own.groupby("point").value.median().astype(float)
                speeds.setdefault(AdapterShape(rank, nblocks), float(np.exp(np.log(medians).mean())))
    if not speeds:
        raise BDLoRAError(f"--speed {path}: found no system with adapters, expected LoRA or BD-LoRA")
    return speeds


def estimated_speeds(model: str, shapes: set[AdapterShape], gpu: str, tp: int) -> Mapping[AdapterShape, float]:
    """The same by `bdlora perf estimate`'s arithmetic, LoRA fully sharded; adapters on all seven linear modules.

    Raises:
        BDLoRAError: the GPU is unknown, or the model cannot be cut for this TP degree.
    """
    deployment, traffic = Deployment(load_shape(model), find_gpu(gpu), tp), Traffic()
    return {
        shape: deployment.requests(shape.serving, traffic).output_throughput
        for shape in sorted(shapes)
        if not shape.nblocks % tp or not tp % shape.nblocks
    }
