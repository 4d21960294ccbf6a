"""Machine code of ours and of SGLang's kernels for a GPU that is absent, and the model of their times."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bdlora_cli.main import app
from bdlora_perf.kernels.absent_gpu import MachineCode
from bdlora_perf.kernels.dependent_loads import Chain, loads_before_product
from bdlora_perf.kernels.latency import CONSTANTS, KNOWN, Work, base_time, corners, launch_time, layer_time
from bdlora_perf.kernels.shapes import Case
from bdlora_perf.kernels.static import MATCHED, SYSTEM_NAMES, read
from bdlora_perf.kernels.static_report import verdict
from bdlora_perf.report.machine import describe_machine
from bdlora_perf.report.render import write_report
from bdlora_perf.report.schema import Metric, Report, Sample, System, load_report, save_report
from bdlora_sglang.errors import BDLoRAError

CASE = Case("Llama-3.1-70B", 8, "o", "decode", 1, 1, "uniform", 8)
H100 = KNOWN[90]
CODE = MachineCode("a", warps=4, registers=90, stack=0, shared=4608, sass="")
WORK = Work(
    programs=1320,
    grid=1320,
    code=CODE,
    chain=Chain(l2=2, memory=1),
    memory_bytes=1e6,
    requested_bytes=2e6,
    activation_bytes=0,
    operations=1e6,
)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "resident"),
    [
        (90, 4608, 4, 5),  # 90 registers are given out as 96, for 128 threads: 12,288 of 65,536
        (32, 40 * 1024, 4, 5),  # 40 KiB and the system's 1 KiB: five in 228 KiB
        (32, 0, 4, 16),  # 64 warps
        (16, 0, 1, 32),  # 32 programs
        (255, 0, 8, 1),
    ],
)
def test_programs_of_a_multiprocessor(registers: int, shared: int, warps: int, resident: int) -> None:
    """NVIDIA's occupancy calculator for compute capability 9.0."""
    code = replace(CODE, registers=registers, shared=shared, warps=warps)
    assert H100.resident(code) == resident


def test_times_by_hand() -> None:
    """1,320 programs, five a multiprocessor of 132: two waves of two reads of the cache and one of memory."""
    two_waves = 2 * (2 * 0.25 + 0.65)
    assert H100.waves(WORK.programs, CODE) == 2.0
    assert launch_time(WORK, H100, CONSTANTS) == (pytest.approx(two_waves), "waves")
    # 10 MB at 90% of 3.35 TB/s, after the first program's loads.
    large = replace(WORK, memory_bytes=1e7)
    assert launch_time(large, H100, CONSTANTS) == (pytest.approx(2 * 0.25 + 0.65 + 1e7 / (3350e3 * 0.9)), "memory")
    # Programs without tokens read one number, as many at a time.
    assert launch_time(replace(WORK, grid=3 * 660), H100, CONSTANTS)[0] == pytest.approx(two_waves + 0.25)


def test_times_of_a_layer_by_hand() -> None:
    """A base layer of 16.8 MB takes 6.2 us: a shrink of 2.3 us is hidden, but for its own megabyte."""
    o, launch = CASE.shape(), 2 * (2 * 0.25 + 0.65)
    assert base_time(o, 1, H100, CONSTANTS) == pytest.approx(0.65 + 2 * 1024 * 8192 / 3015e3)
    hidden = layer_time([WORK, WORK], o, 1, True, H100, CONSTANTS)
    assert hidden == pytest.approx(1e6 / 3015e3 + 0.7 + 1.0 + launch)
    assert layer_time([WORK, WORK], o, 1, False, H100, CONSTANTS) == pytest.approx(2 * (1.0 + launch))
    # Three times as many programs take 6.9 us, and with the gap before them 1.7 us longer than the product.
    long = replace(WORK, programs=3960, grid=3960)
    over = 1.0 + 3 * launch - base_time(o, 1, H100, CONSTANTS)
    assert layer_time([long, WORK], o, 1, True, H100, CONSTANTS) == pytest.approx(hidden + over)
    # Weights of 58.7 MB drive out of 50 MiB what the first launch behind them reads: its first two reads are of memory.
    down = replace(CASE, layer="down").shape()
    cold = layer_time([WORK, WORK], down, 1, False, H100, CONSTANTS)
    assert cold == pytest.approx(2 * (1.0 + launch) + 2 * (0.65 - 0.25))


@pytest.mark.parametrize(
    "more",
    [
        lambda work: replace(work, programs=2 * work.programs),
        lambda work: replace(work, chain=replace(work.chain, l2=work.chain.l2 + 1)),
        lambda work: replace(work, more_memory=work.more_memory + 1),
        lambda work: replace(work, memory_bytes=work.memory_bytes + 1e8),
        lambda work: replace(work, requested_bytes=work.requested_bytes + 1e9),
        lambda work: replace(work, operations=work.operations + 1e12),
        lambda work: replace(work, activation_bytes=1e9),
    ],
)
@pytest.mark.parametrize("capability", KNOWN)
def test_more_work_takes_longer(more: Callable[[Work], Work], capability: int) -> None:
    for constants in corners():
        works = (replace(work, grid=10**4) for work in (WORK, more(WORK)))
        times = [launch_time(work, KNOWN[capability], constants)[0] for work in works]
        assert times[0] < times[1]


def test_dependent_loads_of_code_by_hand() -> None:
    """Table, then entry and B's place at once, then B: the branch waits for the table, the product for all."""
    sass = """
    /*0000*/ LDC.64 R2, c[0x0][0x210] ;   .headerflags EF_CUDA_SM90
    /*0010*/ LDC.64 R4, c[0x0][0x218] ;
    /*0020*/ LDG.E R0, desc[UR4][R2.64] ;
    /*0030*/ ISETP.NE.AND P0, PT, R0, RZ, PT ;
    /*0040*/ @!P0 EXIT ;
    /*0050*/ LDG.E R1, desc[UR4][R2.64+0x4] ;
    /*0060*/ IMAD.WIDE R6, R1, 0x2, R4 ;
    /*0070*/ LDG.E.128 R8, desc[UR4][R6.64] ;
    /*0080*/ HMMA.16816.F32.BF16 R8, R8, R10, RZ ;
    /*0090*/ EXIT ;
    """
    code = replace(CODE, sass=sass, parameters=(("table_ptr", "*i32"), ("b_ptr", "*bf16")))
    assert loads_before_product(code, frozenset({"b_ptr"})) == Chain(l1=1, l2=1, memory=1)
    assert loads_before_product(code, frozenset()) == Chain(l1=1, l2=2)


@pytest.mark.parametrize("system", [*SYSTEM_NAMES, MATCHED])
def test_launches_and_bytes_by_hand(system: str) -> None:
    """One token of one adapter at the o layer: 1024 inputs, 8192 outputs, rank 8, or 32 of plain LoRA."""
    row = read(system, CASE, 90)
    rank = 32 if system == MATCHED else 8
    factors, x, y = 2 * rank * (1024 + 8192), 2 * 1024, 2 * 8192
    assert row["needed"] == factors + x + 2 * y
    assert len(row["kernels"]) == 2 and all(int(kernel["registers"]) > 0 for kernel in row["kernels"])
    # Whoever it is: A, B (ours fetches it before), x for each block of rows of A, h, and y read and written.
    assert row["needed"] <= row["requested"] < 2 * row["needed"]
    assert row["overlap"] == (system not in ("csgmv", "triton"))
    assert min(row["served"]) <= row["served"][0] <= max(row["served"]) and row["serial_us"] > 2 * CONSTANTS.gap
    if system == "bdlora":
        # Blocks of 256 outputs; h of 8 ranks in float32, written once and read by each of 32 of them.
        assert [kernel["programs"] for kernel in row["kernels"]] == [1, 32]
        assert row["requested"] == factors + 2 * rank * 8192 + x + 2 * y + 4 * 8 * (1 + 32)


def test_partial_sums_by_hand() -> None:
    """The same at the down layer: 3584 inputs in 16 splits, whose partial sums are written and read."""
    row = read("bdlora", replace(CASE, layer="down"), 90)
    assert [kernel["programs"] for kernel in row["kernels"]] == [16, 32]
    assert row["requested"] == row["needed"] + 2 * 16 * 4 * 8 + 4 * 8 * 32


def test_verdicts() -> None:
    assert verdict([2.0, 2.0], [3.0, 2.5]) == "ahead"
    assert verdict([3.0, 2.5], [2.0, 2.0]) == "behind"
    # It turns round at a corner; less than one read of the cache.
    assert verdict([2.0, 2.0], [3.0, 1.9]) == verdict([2.0, 2.0], [2.2, 2.2]) == "tie"


def measured_report(case: Case, times: dict[str, float]) -> Report:
    return Report(
        kind="kernels", title="measured", command="", started="", seconds=1, seed=0, machine=describe_machine(),
        settings={"gpu": "H100"}, systems={name: System(label=name) for name in times},
        metrics={"time_us": Metric(label="time", unit="us", better="lower")},
        samples=tuple(
            Sample(system=name, point=case.point, round=0, metrics={"time_us": time}) for name, time in times.items()
        ),
    )  # fmt: skip


def test_a_report_beside_a_measurement(tmp_path: Path) -> None:
    """``bdlora perf kernels --static --measured``: the model at the cases that were measured, and a page of it."""
    times = {"bdlora": 6.0, "csgmv": 8.0, "triton_v2": 6.0}
    save_report(measured_report(CASE, times), tmp_path)
    command = ["perf", "kernels", "--static", "--architecture", "sm_90", "--measured", str(tmp_path)]
    done = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "static")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    folder = tmp_path / "static" / "sm_90"
    report = load_report(folder)
    assert report.kind == "kernels-static" and report.estimate and report.settings["measured"] == "H100"
    figures = {sample.system: sample.metrics["serial_us"] for sample in report.samples}
    assert {name: figures[f"{name}_measured"] for name in times} == times
    assert any("model over measurement" in note for note in report.notes)
    assert any("A model: nothing is timed" in note for note in report.notes)
    assert len((folder / "launches.csv").read_text().splitlines()) == 1 + len(SYSTEM_NAMES) + 1
    assert folder / "report.html" in write_report(report, folder, html=True)


def test_a_report_without_timed_layers_is_refused(tmp_path: Path) -> None:
    """A whole decode step is no layer that the model knows."""
    save_report(measured_report(replace(CASE, layer="decode step"), {"bdlora": 900.0}), tmp_path)
    command = ["perf", "kernels", "--static", "--measured", str(tmp_path), "--output", str(tmp_path / "static")]
    with pytest.raises(BDLoRAError, match="found no layer with times, expected one"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    assert not (tmp_path / "static").exists()


def test_unknown_options_are_named(tmp_path: Path) -> None:
    for option, value in (("--architecture", "sm_75"), ("--model", "tiny-8B"), ("--phase", "both")):
        with pytest.raises(Exception, match=f"{option}: found '{value}', expected one of"):
            CliRunner().invoke(
                app,
                ["perf", "kernels", "--static", option, value, "--output", str(tmp_path)],
                catch_exceptions=False,
            )
