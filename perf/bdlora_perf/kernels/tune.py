"""Find launch configurations for this GPU, and write its configuration file.

Run ``python -m bdlora_perf.kernels.tune --output sm_90.json --minutes 3``; it needs torch and Triton. Each shape
starts from the configuration that it has, and one field after the other takes the value that is fastest. Shapes come in
order of weight; those that the time does not suffice for keep what they have. Put the file into
``bdlora_kernels/launch_configurations`` and run the compile test, which refuses register spills.
"""

import argparse
import statistics
import time
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import triton  # type: ignore[import-untyped, unused-ignore]

from bdlora_kernels.configurations import Configuration, Configurations, device_configurations, format_configurations
from bdlora_perf.kernels.contenders import prepare_ours, prepare_with_base, shape_of_problem
from bdlora_perf.kernels.measure import Record, attempt, check_and_capture, replace_text
from bdlora_perf.kernels.problem import Contender, Problem, make_problem
from bdlora_perf.kernels.shapes import all_cases
from bdlora_perf.kernels.timing import time_calls

# In this order: the first fields matter most.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "splits": (1, 2, 4, 8, 16),
    "block_o": (64, 128, 256),
    "block_k": (64, 128, 256),
    "tokens_at_once": (8, 16, 32),
    "block_r": (16, 32, 64),
    "expand_warps": (2, 4, 8),
    "shrink_stages": (2, 3, 4),
    "expand_registers": (80, 96, 128, 168),
    "shrink_registers": (96, 128, 168),
}
_ROUNDS = 5
# A change must win by more than two runs of one configuration differ.
_MARGIN = 0.98
_MOST_CASES = 24


def seconds_of(prepare: Contender, problem: Problem, exact_TO: torch.Tensor | None = None) -> float:
    """Median time of a call; infinite where it does not run here, or its result is not ``exact_TO`` (None: any)."""
    record: Record = {}
    captured = attempt(record, partial(check_and_capture, prepare, problem, exact_TO, record))
    return float("inf") if captured is None else statistics.median(time_calls({"": captured}, _ROUNDS)[""]) * 1e-6


def with_base(problem: Problem, configuration: Configuration) -> Configuration:
    """The configuration with the shrink beside the base layer's product, B fetched there or not, or after it."""
    beside, after = (replace(configuration, overlap=overlap, prefetch_b=False, pdl=False) for overlap in (True, False))
    best, *others = after, beside, replace(beside, prefetch_b=True)
    seconds = seconds_of(partial(prepare_with_base, configuration=best), problem)
    for candidate in others:
        found = seconds_of(partial(prepare_with_base, configuration=candidate), problem)
        if found < _MARGIN * seconds:
            best, seconds = candidate, found
    return best if best.overlap else replace(after, pdl=configuration.pdl)


def tune(problem: Problem, configuration: Configuration, deadline: float) -> tuple[Configuration, float, float]:
    """The best configuration that was found, and the seconds of a call before and after."""
    exact_TO = problem.exact()
    before = best = seconds_of(partial(prepare_ours, configuration=configuration), problem, exact_TO)
    for field, values in OPTIONS.items():
        for value in values:
            if value == getattr(configuration, field) or time.monotonic() > deadline:
                continue
            candidate = replace(configuration, **{field: value})
            found = seconds_of(partial(prepare_ours, configuration=candidate), problem, exact_TO)
            if found < _MARGIN * best:
                configuration, best = candidate, found
    return configuration, before, best


def tune_device(minutes: float) -> Configurations:
    """The configurations of this GPU, with those that were tuned in place of what was known."""
    device, deadline = torch.device("cuda"), time.monotonic() + 60 * minutes
    known = device_configurations(device)
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    tuned = dict(known.tuned)
    # What `bdlora_perf.kernels.measure` comes to first, in its order.
    for case in islice(all_cases(), _MOST_CASES):
        if time.monotonic() > deadline:
            break
        problem = make_problem(case, device, cache_bytes, max_sets=32)
        shape, chosen = shape_of_problem(problem, known)
        found, before, after = tune(problem, chosen, deadline)
        found = with_base(problem, found) if case.phase == "decode" else found
        print(f"{shape}: {before * 1e6:.2f} us, {after * 1e6:.2f} us with {found}", flush=True)
        if found != chosen:
            tuned[shape] = found
    origin = f"tuned on {torch.cuda.get_device_name(device)}, torch {torch.__version__}, Triton {triton.__version__}"
    return replace(known, origin=origin, tuned=tuned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the configuration file to write")
    parser.add_argument("--minutes", type=float, default=3, help="nothing new is tried later")
    arguments = parser.parse_args()
    text = format_configurations(tune_device(arguments.minutes))
    replace_text(arguments.output, text)


if __name__ == "__main__":
    main()
