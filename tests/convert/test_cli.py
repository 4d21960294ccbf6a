"""``bdlora convert``, as a user runs it: messages, tables, exit codes, a folder of adapters, the plot."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from bdlora_cli.convert import app
from bdlora_sglang.convert import ConversionReport, ConvertOptions, RankChoice, inspect_adapter, lora2bd
from bdlora_sglang.errors import BDLoRAError
from tests.convert.oracle import CONFIG, O, Q, deltas, relative_errors, save_lora, snapshot

SHAPES = {Q: (32, 64), O: (64, 32)}


def bdlora_convert(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return save_lora(tmp_path / "lora", SHAPES)


def test_there_and_back(lora: Path, tmp_path: Path) -> None:
    for arguments in (
        ("lora2bd", lora, tmp_path / "bd", "--tp", 4, "--lossless"),
        ("reblock", tmp_path / "bd", tmp_path / "two", "--nblocks", 2),
        ("bd2lora", tmp_path / "two", tmp_path / "back"),
    ):
        result = bdlora_convert(*arguments)
        assert result.exit_code == 0, result.output
        assert "relative error of the deltas 0.000e+00" in result.output
    assert max(relative_errors(lora, tmp_path / "back").values()) == 0
    result = bdlora_convert("verify", lora, tmp_path / "back", "--max-error", 0)
    assert result.exit_code == 0
    assert "2 modules, largest error 0.000e+00" in result.output


def test_options_reach_the_library(lora: Path, tmp_path: Path) -> None:
    result = bdlora_convert(
        *("lora2bd", lora, tmp_path / "cli", "--nblocks", 4, "--max-error", 0.5, "--param-ratio", 0.87, "--keep-plain"),
        *(
            "--target-modules-bd-a",
            "o_proj",
            "--target-modules-bd-b",
            "q_proj,k_proj",
            "--target-modules-bd-b",
            "v_proj",
        ),
        *("--dtype", "bfloat16", "--compute-dtype", "float64", "--threads", 2, "--device", "cpu"),
    )
    assert result.exit_code == 0, result.output
    options = ConvertOptions(
        4, RankChoice(param_ratio=0.87, max_error=0.5), target_modules_bd_a=("o_proj",),
        target_modules_bd_b=("q_proj", "k_proj", "v_proj"), keep_plain=True, dtype="bfloat16", compute_dtype="float64",
    )  # fmt: skip
    lora2bd(lora, tmp_path / "library", options)
    assert snapshot(tmp_path / "cli") == snapshot(tmp_path / "library")


def test_a_users_error_is_a_message_and_exit_code_1(lora: Path, tmp_path: Path) -> None:
    paths = [str(lora), str(tmp_path / "bd")]
    command = [sys.executable, "-m", "bdlora_cli.main", "convert", "lora2bd", *paths, "--nblocks", "7"]
    done = subprocess.run([*command, "--lossless"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "expected a multiple of --nblocks 7" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "bd").exists()


def test_verify_above_the_limit(lora: Path, tmp_path: Path) -> None:
    lora2bd(lora, tmp_path / "bd", ConvertOptions(4, RankChoice(rank=4)))
    result = bdlora_convert("verify", lora, tmp_path / "bd", "--max-error", 0.01)
    assert isinstance(result.exception, BDLoRAError)
    delta, found = deltas(lora)[Q], deltas(tmp_path / "bd")[Q]
    spectral = float(torch.linalg.matrix_norm(found - delta, 2) / torch.linalg.matrix_norm(delta, 2))
    frobenius = relative_errors(lora, tmp_path / "bd")[Q]
    assert f"{frobenius:.3e}" in result.output and f"{spectral:.3e}" in result.output


def test_verify_on_a_model(model: Path, tmp_path: Path) -> None:
    from bdlora_perf.synthetic import make_adapter
    from bdlora_sglang.convert import compare_logprobs

    a = make_adapter(tmp_path / "a", model, rank=8)
    lora2bd(a, tmp_path / "exact", ConvertOptions(4), lossless=True)
    lora2bd(a, tmp_path / "cut", ConvertOptions(4, RankChoice(rank=4)))
    exact = compare_logprobs(a, tmp_path / "exact", str(model), "Hello there")
    cut = compare_logprobs(a, tmp_path / "cut", str(model), "Hello there")
    assert exact.largest < 1e-3
    assert cut.largest > 0.1
    assert exact.mean_kl < 1e-6 < cut.mean_kl
    assert exact.same_argmax == 1
    result = bdlora_convert("verify", a, tmp_path / "exact", "--model", model, "--prompt", "Hello there")
    assert result.exit_code == 0 and "same most likely token at 100% of positions" in result.output


def test_inspect_counts_bytes_per_gpu(lora: Path, tmp_path: Path) -> None:
    """By hand: q 32 -> 64 and o 64 -> 32, float32, rank 4; as 4 blocks without loss rank 16."""
    lora2bd(lora, tmp_path / "bd", ConvertOptions(4), lossless=True)
    plain, bd = inspect_adapter(lora), inspect_adapter(tmp_path / "bd")
    assert (plain.kind, plain.nblocks, bd.kind, bd.nblocks, bd.ranks) == ("LoRA", 1, "BD-LoRA", 4, (16,))
    for size in plain.bytes_per_gpu:  # a plain adapter is already what SGLang holds: one factor whole, the other cut
        tp = size.tp_size
        assert size.communication_free == size.replicated == 4 * 4 * 2 * (32 + 64 // tp)
        assert size.fully_sharded == 4 * 4 * 2 * (32 + 64) // tp
    for size in bd.bytes_per_gpu:
        tp = size.tp_size
        # As many blocks as ranks, or more: 1 / tp each. Fewer: a block's shared factor on two ranks.
        assert size.communication_free == 4 * 2 * (16 * 32 // min(tp, 4) + 64 * 4 // tp)
        assert size.replicated == 4 * 16 * 2 * (32 + 64 // tp)
        assert size.fully_sharded == 4 * 16 * 2 * (32 + 64) // tp
    result = bdlora_convert("inspect", tmp_path / "bd")
    assert result.exit_code == 0
    for text in ("BD-LoRA, 4 block(s)", "column-parallel", "q_proj x 1", f"{bd.num_parameters:,}", "S-LoRA"):
        assert text in result.output


@pytest.fixture
def many(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        save_lora(tmp_path / "many" / name, SHAPES, seed=ord(name))
    (tmp_path / "many" / "notes").mkdir()
    return tmp_path / "many"


def test_many_adapters(many: Path, tmp_path: Path) -> None:
    config = (many / "b" / CONFIG).read_text()
    (many / "b" / CONFIG).write_text("{")
    command = ("lora2bd", many, tmp_path / "out", "--nblocks", 4, "--rank", 8)
    result = bdlora_convert(*command)
    assert result.exit_code == 1
    assert "expected a JSON object" in result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "c"]
    lora2bd(many / "a", tmp_path / "alone", ConvertOptions(4, RankChoice(rank=8)))
    assert snapshot(tmp_path / "alone") == snapshot(tmp_path / "out" / "a")
    # Mended and run again: the finished ones are skipped, and not touched.
    (many / "b" / CONFIG).write_text(config)
    stamp = (tmp_path / "out" / "a").stat().st_mtime_ns
    result = bdlora_convert(*command)
    assert result.exit_code == 0, result.output
    assert (result.output.count("skipped"), result.output.count("converted")) == (2, 1)
    assert (tmp_path / "out" / "a").stat().st_mtime_ns == stamp
    # Other options: what is there is not what is asked for.
    result = bdlora_convert(*command[:-1], 16)
    assert result.exit_code == 1 and result.output.count("found an existing path") == 3


def test_a_process_that_dies_costs_one_adapter(many: Path, tmp_path: Path) -> None:
    from bdlora_sglang.convert import Job, Outcome, convert_all

    options = ConvertOptions(4, RankChoice(rank=8))
    (tmp_path / "out").mkdir()
    jobs = [
        Job(
            many / name,
            tmp_path / "out" / name,
            _die if name == "b" else lora2bd,
            (options,),
            "lora2bd",
            options.record(),
        )
        for name in ("a", "b", "c")
    ]
    results = {result.job.source.name: result for result in convert_all(jobs, workers=2)}
    assert {name: result.outcome for name, result in results.items()} == {
        "a": Outcome.CONVERTED, "b": Outcome.FAILED, "c": Outcome.CONVERTED,
    }  # fmt: skip
    assert results["b"].message == "its process ended with code -9, without a result"
    assert results["a"].report is not None and results["a"].report.parameters > 0


def _die(*_: object, **__: object) -> ConversionReport:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("not reached")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(suffix: str, lora: Path, tmp_path: Path) -> None:
    plot = tmp_path / f"plot.{suffix}"
    arguments = ("lora2bd", lora, tmp_path / "bd", "--nblocks", 4, "--param-ratio", 0.87, "--plot", plot)
    result = bdlora_convert(*arguments)
    assert result.exit_code == 0, result.output
    first = plot.read_bytes()
    assert first.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    assert bdlora_convert(*arguments, "--force").exit_code == 0
    assert plot.read_bytes() == first
    wrong = bdlora_convert(*arguments[:-1], tmp_path / "plot.txt", "--force")
    assert isinstance(wrong.exception, BDLoRAError) and "--plot" in str(wrong.exception)


def test_plotted_curves_are_the_conversions(lora: Path, tmp_path: Path) -> None:
    from bdlora_sglang.adapter import Adapter
    from bdlora_sglang.convert.plan import Plan, Steps
    from bdlora_sglang.convert.plot import greedy_curve, uniform_curve
    from bdlora_sglang.convert.ranks import _spectra

    options = ConvertOptions(4)
    plan = Plan.make(Adapter.open(lora), options)
    costs = plan.costs()
    spectra = _spectra(plan, options, None, costs, Steps(0, None))
    for index, (parameters, error) in enumerate(zip(*uniform_curve(costs, spectra), strict=True)):
        report = lora2bd(lora, tmp_path / f"bd-{index}", ConvertOptions(4, RankChoice(rank=4 * (index + 1))))
        assert report.parameters == parameters
        assert report.error == pytest.approx(error, abs=1e-3)
    greedy_parameters, errors = greedy_curve(costs, spectra)
    assert greedy_parameters == sorted(greedy_parameters)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(0, abs=1e-3)


def test_help_needs_no_torch() -> None:
    """Heavy imports wait until they are needed."""
    code = "import sys, bdlora_cli.convert; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert bdlora_convert("lora2bd", "--help").exit_code == 0


@pytest.mark.parametrize("choice", [RankChoice(rank=4), RankChoice(max_error=0.5)], ids=["one-pass", "two-passes"])
def test_progress_ends_at_its_total(choice: RankChoice, lora: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    lora2bd(lora, tmp_path / "bd", ConvertOptions(2, choice), progress=lambda done, total: steps.append((done, total)))
    assert steps == [(i + 1, len(steps)) for i in range(len(steps))]
