"""Measure the LoRA kernels on this GPU, side by side.

Run ``python -m bdlora_perf.kernels.measure --output DIR --minutes 8``; it needs torch, Triton and NumPy. What can be
imported of SGLang and FlashInfer is measured with it. The cases come in order of weight, and ``DIR/raw.json`` is
written after each: a run that is out of time has the most telling ones. ``bdlora perf kernels`` makes a report of it.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton  # type: ignore[import-untyped, unused-ignore]

from bdlora_kernels.configurations import device_configurations
from bdlora_perf.kernels.contenders import prepare_with_base, same_factors, sglang_contenders
from bdlora_perf.kernels.problem import Call, Contender, Problem, base_product, error_in_units, make_problem
from bdlora_perf.kernels.shapes import LAYERS, MODELS, Case, all_cases, tiny_cases
from bdlora_perf.kernels.timing import CapturedCalls, capture, measure_ceilings, time_calls
from bdlora_perf.report.machine import machine_facts

MIN_CALLS = 20
# A contender whose error is larger computes something else, and is not timed. Rounding h to 16 bits costs one more.
MAX_ERROR_UNITS = 4
# What a contender raises where it cannot run a case: that is reported, and the others go on.
FAILURES = (RuntimeError, AssertionError, ValueError, TypeError, NotImplementedError, KeyError, triton.TritonError)
# Batches of a whole decode step: tokens and adapters.
STEPS = ((64, 64), (16, 16), (1, 1), (256, 64))
STEP_RANK = 8
# The first cases, of three batches at each layer, are measured with the base layer's product, too.
CASES_WITH_BASE = 3 * len(LAYERS)
WITH_BASE: dict[str, Contender] = {
    "base": base_product,
    "bdlora_with_base": partial(prepare_with_base, overlap=False),
    "bdlora_beside_base": partial(prepare_with_base, overlap=True),
}

Record = dict[str, Any]
# Captures a contender's calls. Its record gets what is found before; None where nothing is to be timed.
Entry = Callable[[Record], CapturedCalls | None]
T = TypeVar("T")


def measure_case(case: Case, device: torch.device, cache_bytes: int) -> Record:
    """Every contender at one case: the error against float64, and the times."""
    problem = make_problem(case, device, cache_bytes)
    exact_TO = problem.exact()
    entries: dict[str, Entry] = {
        name: partial(check_and_capture, prepare, problem, None if name == "copy" else exact_TO)
        for name, prepare in same_factors(device).items()
    }
    for suffix, rank in case.matched_ranks().items() if device.type == "cuda" else ():
        matched = make_problem(replace(case, rank=rank), device, cache_bytes)
        exact_TO = matched.exact()
        for name, prepare in sglang_contenders().items():
            entries[f"{name}_{suffix}"] = partial(check_and_capture, prepare, matched, exact_TO)
    return _measure(case, case.floor_bytes(), case.floating_point_operations(), entries)


def measure_with_base(case: Case, device: torch.device, cache_bytes: int) -> Record:
    """The base layer's product with our delta, one after the other and with the shrink on a second stream."""
    problem, shape = make_problem(case, device, cache_bytes), case.shape()
    product_TO = problem.exact_base()
    exact_TO = replace(problem, y_TO=product_TO).exact()
    contenders = dict(WITH_BASE)
    if device.type == "cuda":
        contenders |= {f"{name}_with_base": prepare for name, prepare in sglang_contenders(with_base=True).items()}
    entries: dict[str, Entry] = {
        name: partial(check_and_capture, prepare, problem, product_TO if name == "base" else exact_TO)
        for name, prepare in contenders.items()
    }
    weights = shape.inputs * shape.total_outputs
    floor_bytes = case.floor_bytes() + 2 * weights
    operations = case.floating_point_operations() + 2 * case.tokens * weights
    return _measure(replace(case, layer=f"{case.layer} with base"), floor_bytes, operations, entries)


def measure_step(tokens: int, adapters: int, device: torch.device, cache_bytes: int) -> Record:
    """All LoRA of one decode step of the largest model at TP 8: every layer has factors of its own."""
    model = next(iter(MODELS))
    cases = [Case(model, 8, layer, "decode", tokens, adapters, "uniform", STEP_RANK) for layer in LAYERS]
    problems = [make_problem(case, device, cache_bytes, max_sets=32) for case in cases]
    layers = MODELS[model][2]
    entries: dict[str, Entry] = {
        name: partial(_capture_step, prepare, problems, layers) for name, prepare in same_factors(device).items()
    }
    floor_bytes = layers * sum(case.floor_bytes() for case in cases)
    operations = layers * sum(case.floating_point_operations() for case in cases)
    return _measure(replace(cases[0], layer="decode step"), floor_bytes, operations, entries)


def _measure(case: Case, floor_bytes: int, operations: int, entries: Mapping[str, Entry]) -> Record:
    """Each contender's record, with times where its calls could be captured: those of all are replayed in turn."""
    systems: dict[str, Record] = {name: {} for name in entries}
    captured: dict[str, CapturedCalls] = {}
    for name, entry in entries.items():
        found = attempt(systems[name], partial(entry, systems[name]))
        captured |= {} if found is None else {name: found}
    for name, times in time_calls(captured).items():
        systems[name]["times_us"] = times
    floor = {"floor_bytes": floor_bytes, "floating_point_operations": operations}
    return {"point": case.point, **floor, "systems": systems}


def check_and_capture(
    prepare: Contender, problem: Problem, exact_TO: torch.Tensor | None, record: Record
) -> CapturedCalls | None:
    """Calls that compute ``exact_TO``, or nothing at all where it is None; on a GPU they are captured."""
    record["rank"] = problem.case.rank
    # Every call adds to y: the next contender finds that of the problem as it was.
    problem = replace(problem, y_TO=problem.y_TO.clone())
    call = prepare(problem)
    if exact_TO is not None and not _is_right(record, call, problem, exact_TO):
        return None
    if problem.x_TI.device.type != "cuda":
        return None
    return capture(call, problem.num_sets, max(MIN_CALLS, problem.num_sets))


def _is_right(record: Record, call: Call, problem: Problem, exact_TO: torch.Tensor) -> bool:
    attempt(record, partial(call, 0))
    record["error_units"] = error_in_units(problem.y_TO, exact_TO)
    if "failure" not in record and not record["error_units"] <= MAX_ERROR_UNITS:
        record["failure"] = f"error of {record['error_units']:.1f} roundings, expected at most {MAX_ERROR_UNITS}"
    return "failure" not in record


def _capture_step(prepare: Contender, problems: list[Problem], layers: int, record: Record) -> CapturedCalls:
    record["rank"] = STEP_RANK
    calls = [(prepare(problem), problem.num_sets) for problem in problems]

    def layer(n: int) -> None:
        for call, sets in calls:
            call(n % sets)

    return replace(capture(layer, layers, layers), num_calls=1)


def attempt(record: Record, step: Callable[[], T]) -> T | None:
    """The result of a step, or None with the reason in the record."""
    try:
        return step()
    except FAILURES as error:
        record["failure"] = f"{type(error).__name__}: {str(error).strip()[:500]}"
        return None


def describe(device: torch.device) -> Record:
    """What runs here; no names of hosts or users."""
    origin = device_configurations(device)
    described = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    return {**described, "configurations": f"sm_{origin.capability}, {origin.origin}"}


def replace_text(path: Path, text: str) -> None:
    """Write at once: nobody finds half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def measure(folder: Path, minutes: float, interpret: bool = False) -> Record:
    """Measure until the time is over; ``interpret`` checks tiny cases on the CPU and times nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    started, start = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.monotonic()
    device = torch.device("cpu" if interpret else "cuda")
    raw: Record = {"started": started, "command": " ".join(sys.argv), "machine": describe(device), "cases": []}
    raw["host"] = machine_facts()
    cache_bytes = 0 if interpret else torch.cuda.get_device_properties(device).L2_cache_size
    if not interpret:
        raw["ceilings"] = measure_ceilings(device)
    cases = list(tiny_cases() if interpret else all_cases())
    steps = [partial(measure_case, case, device, cache_bytes) for case in cases]
    with_base = [partial(measure_with_base, case, device, cache_bytes) for case in cases[:CASES_WITH_BASE]]
    if interpret:
        steps += with_base
    else:
        # After the first case of each layer: their kernels are compiled then.
        decode_steps = [partial(measure_step, *batch, device, cache_bytes) for batch in STEPS]
        steps[len(LAYERS) : len(LAYERS)] = [*decode_steps, *with_base]
    for step in steps:
        if time.monotonic() - start > minutes * 60:
            break
        raw["cases"].append(step())
        raw["seconds"] = time.monotonic() - start
        replace_text(folder / "raw.json", json.dumps(raw, indent=1) + "\n")
        print_case(raw["cases"][-1])
    return raw


def print_case(record: Record) -> None:
    """One line: the case, and each system's median time, or its error where it is not timed."""
    parts = []
    for name, system in record["systems"].items():
        if times := system.get("times_us"):
            found = f"{statistics.median_high(times):.2f}us"
        else:
            found = system.get("failure", f"{system.get('error_units', 0):.2f}u")
        parts.append(f"{name} {found[:60]}")
    print(*record["point"].values(), "|", ", ".join(parts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for raw.json")
    parser.add_argument("--minutes", type=float, default=8, help="no case starts later")
    parser.add_argument("--interpret", action="store_true", help="check tiny cases on the CPU (TRITON_INTERPRET=1)")
    arguments = parser.parse_args()
    measure(arguments.output, arguments.minutes, arguments.interpret)


if __name__ == "__main__":
    main()
