"""What is measured, and the report of it; figures worked out by hand."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bdlora_perf.kernels.problem import Call, Problem, make_problem
from bdlora_perf.kernels.results import load_raw, make_report
from bdlora_perf.kernels.shapes import Case, all_cases, tiny_cases
from bdlora_perf.report.machine import machine_facts
from bdlora_perf.report.schema import load_report


@pytest.mark.parametrize(
    ("model", "tp", "layer", "inputs", "outputs"),
    [
        ("Llama-3.1-70B", 8, "qkv", 8192, (1024, 128, 128)),
        ("Llama-3.1-70B", 8, "o", 1024, (8192,)),
        ("Llama-3.1-70B", 8, "gate_up", 8192, (3584, 3584)),
        ("Llama-3.1-70B", 8, "down", 3584, (8192,)),
        ("Llama-3.1-8B", 4, "qkv", 4096, (1024, 256, 256)),
        ("Llama-3.1-8B", 1, "down", 14336, (4096,)),
    ],
)
def test_layer_shapes(model: str, tp: int, layer: str, inputs: int, outputs: tuple[int, ...]) -> None:
    found = Case(model, tp, layer, "decode", 1, 1, "uniform", 8).shape()
    assert (found.inputs, found.outputs) == (inputs, outputs)


def test_least_bytes_and_operations() -> None:
    """One token of one adapter at the o layer: A 8 x 1024, B 8192 x 8, x 1024 read, y 8192 read and written."""
    case = Case("Llama-3.1-70B", 8, "o", "decode", 1, 1, "uniform", 8)
    assert case.floor_bytes() == 2 * (8 * 1024 + 8 * 8192 + 1024 + 2 * 8192)
    assert case.floating_point_operations() == 2 * 8 * (1024 + 8192)
    # A BD-LoRA of 8 blocks of rank 8 is matched with plain LoRA of rank 32 (2 r) and 16 (4 r).
    assert case.matched_ranks() == {"r2": 32, "r4": 16}


def test_cases_come_once_and_the_most_telling_first() -> None:
    cases = list(all_cases())
    assert len(cases) == len(set(cases))
    assert [case.layer for case in cases[:4]] == ["qkv", "o", "gate_up", "down"]
    assert {(case.model, case.tp, case.rank, case.tokens) for case in cases[:4]} == {("Llama-3.1-70B", 8, 8, 64)}
    assert {case.rank for case in cases} == {2, 4, 8, 16, 32, 64}
    assert {case.tp for case in cases} == {1, 4, 8}
    assert all(slot < case.adapters for case in cases for slot in case.slots())


def test_report() -> None:
    case = Case("Llama-3.1-70B", 8, "o", "decode", 1, 1, "uniform", 8)
    systems = {
        "bdlora": {"rank": 8, "error_units": 0.5, "times_us": [2.0, 4.0, 3.0]},
        "csgmv": {"rank": 8, "error_units": 0.6, "times_us": [6.0, 6.0, 5.0]},
        "triton": {"rank": 8, "failure": "RuntimeError: no"},
        "triton_v2": {"rank": 8, "error_units": 0.6, "times_us": [4.5, 4.5, 9.0]},
        "csgmv_r2": {"rank": 32, "error_units": 0.6, "times_us": [9.0, 9.0, 9.0]},
    }
    with_base = {
        "base": {"rank": 8, "error_units": 0.4, "times_us": [3.0, 3.0, 3.0]},
        "bdlora_with_base": {"rank": 8, "error_units": 0.9, "times_us": [6.0, 6.0, 7.0]},
        "bdlora_beside_base": {"rank": 8, "error_units": 0.9, "times_us": [4.0, 5.0, 5.0]},
    }
    floor = {"floor_bytes": 6_000_000, "floating_point_operations": 3_000_000}
    raw = {
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 1.0,
        "command": "measure",
        "machine": {"gpu": "a GPU"},
        "host": {**machine_facts(), "processor": "another machine's"},
        "ceilings": {"copy_gb_per_s": 4000.0, "launch_us": 1.0},
        "cases": [
            {"point": case.point, **floor, "systems": systems},
            {"point": {**case.point, "layer": "o with base"}, **floor, "systems": with_base},
        ],
    }
    report = make_report(raw)
    assert report.machine.processor == "another machine's"
    assert report.kind == "kernels" and report.baselines == ("csgmv", "triton", "triton_v2")
    assert (
        report.systems["csgmv_r2"].label
        == "SGLang csgmv (default blocks where it has none tuned), plain LoRA, half the BD rank"
    )
    (first, *_) = report.samples
    # 6 MB in 2 us are 3000 GB/s, 3 MFLOP in 2 us are 1.5 TFLOP/s.
    assert first.metrics == pytest.approx(
        {"time_us": 2.0, "gb_per_s": 3000.0, "tflop_per_s": 1.5, "share_of_ceiling": 0.75}
    )
    assert [(failure.system, failure.message) for failure in report.failures] == [("triton", "RuntimeError: no")]
    assert report.notes == (
        "decode: 1.50 times as fast as the best of SGLang's on the same factors "
        "(geometric mean of 1 cases, 1.50 to 1.50).",
        "decode: 3.00 times as fast as the best of SGLang's serving plain LoRA, half the BD rank "
        "(geometric mean of 1 cases, 3.00 to 3.00).",
        "decode: a layer is 1.200 times as fast with the shrink beside the base "
        "(geometric mean of 1 cases, 1.200 to 1.200).",
    )


def test_the_interpreter_checks_every_contender(tmp_path: Path) -> None:
    """``bdlora perf kernels --interpret``: tiny cases, also beside the base layer's product, and no times."""
    command = [sys.executable, "-m", "bdlora_cli.main", "perf", "kernels", "--interpret", "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    raw = load_raw(tmp_path)
    checked = {name: system for case in raw["cases"] for name, system in case["systems"].items() if name != "copy"}
    assert set(checked) == {"bdlora", "cublas_loop", "base", "bdlora_with_base", "bdlora_beside_base"}
    assert all(0 < system["error_units"] < 1.5 for system in checked.values())
    assert load_report(tmp_path).failures == ()


def test_a_contender_leaves_the_next_one_its_problem() -> None:
    """Calls that are captured go on adding to y: the next contender is checked on y as it was."""
    pytest.importorskip("triton")
    from bdlora_perf.kernels.contenders import prepare_cublas_loop
    from bdlora_perf.kernels.measure import check_and_capture

    problem = make_problem(next(tiny_cases()), torch.device("cpu"), cache_bytes=0)
    exact_TO = problem.exact()
    for _ in range(2):
        calls: list[Call] = []

        def prepare(problem: Problem, calls: list[Call] = calls) -> Call:
            calls.append(prepare_cublas_loop(problem))
            return calls[0]

        record: dict[str, float] = {}
        assert check_and_capture(prepare, problem, exact_TO, record) is None
        assert record["error_units"] < 1.5 and "failure" not in record
        calls[0](0)


def test_a_run_without_sglang_says_so_and_goes_on() -> None:
    program = (
        "import sys; sys.modules['sglang'] = None\n"
        "from bdlora_perf.kernels.contenders import sglang_contenders\n"
        "for prepare in (*sglang_contenders().values(), *sglang_contenders(with_base=True).values()):\n"
        "    try: prepare(None)\n"
        "    except RuntimeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.count("SGLang's kernels cannot be imported: ") == 6
