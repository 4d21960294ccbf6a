"""The paper's headlines, what is suggested, the report, and the command."""

import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bdlora_cli.perf_estimate import estimate as command
from bdlora_perf.estimate.hardware import GPUS
from bdlora_perf.estimate.lora_cost import ASSUMPTIONS
from bdlora_perf.estimate.model_shape import SHAPES
from bdlora_perf.estimate.paper import HEADLINES, Comparison, compare_headlines
from bdlora_perf.estimate.recommend import candidates
from bdlora_perf.estimate.report import METRICS, make_estimate, make_report
from bdlora_perf.estimate.roofline import Deployment
from bdlora_perf.estimate.traffic import Traffic
from bdlora_perf.report.run import Run
from bdlora_perf.report.schema import Report, load_report
from bdlora_sglang.errors import BDLoRAError

SMALL = ("llama-3.1-8b", "a100", 8, Traffic(concurrency=8, adapters=4))


def report_of(
    model: str, gpu: str, tp: int, traffic: Traffic, ranks: tuple[int, ...], blocks: tuple[int, ...] = ()
) -> Report:
    return make_report(make_estimate(model, gpu, tp, traffic, ranks, blocks), Run("", seed=0))


@pytest.fixture(scope="module")
def comparisons() -> tuple[Comparison, ...]:
    return compare_headlines()


@pytest.mark.parametrize(
    ("index", "speed_ups", "needed", "most_host"),
    # Pinned as they came out. None of the model's constants was fitted to the paper's figures: do not start now.
    [
        (0, (1.26, 1.25, 1.25, 1.25), 35, None),
        (1, (1.26, 1.24, 1.24, 1.24), 10, 15.0),
        (2, (1.59, 1.51, 1.51, 1.29), 12, None),
        (3, (1.59, 1.51, 1.51, 1.10), 5, 3.6),
    ],
    ids=["70b-2r", "70b-4r", "8b-2r", "8b-4r"],
)
def test_the_papers_headlines(
    comparisons: tuple[Comparison, ...],
    index: int,
    speed_ups: tuple[float, ...],
    needed: float,
    most_host: float | None,
) -> None:
    """A range by assumption, and what the first would take: 70B at 2r takes twice the latency that is measured.

    A host of 5 ms leaves 10 to 29% on 8B, about what the authors named later.
    """
    comparison = comparisons[index]
    assert comparison.headline is HEADLINES[index]
    assert list(comparison.speed_ups) == [known.name for known in ASSUMPTIONS]
    assert tuple(comparison.speed_ups.values()) == pytest.approx(speed_ups, abs=0.006)
    assert comparison.parameter_ratio == pytest.approx(comparison.headline.parameter_ratio, abs=0.0051)
    assert comparison.needed_latency == pytest.approx(needed * 1e-6, abs=6e-7)
    assert comparison.most_host == (None if most_host is None else pytest.approx(most_host * 1e-3, abs=6e-5))


def test_suggestions() -> None:
    deployment = Deployment(SHAPES["llama-3.1-70b"], GPUS["a100"], 8)
    found = candidates(deployment, Traffic(), 64, (4, 8, 16))
    suggested = {c.purpose: (c.serving.rank, c.serving.nblocks) for c in found if c.purpose is not None}
    # The paper's own choice for the same quality, and the most parameters that still gain.
    assert suggested["speed"] == (128, 8)
    larger = next(c for c in found if c.purpose == "quality")
    assert larger.over_s_lora[0] > 1 and larger.over_replicated[0] > 1
    assert larger.over_s_lora[0] < larger.over_s_lora[1]
    rest = [c for c in found if c.parameter_ratio > larger.parameter_ratio]
    assert all(min(c.over_s_lora[0], c.over_replicated[0]) <= 1 for c in rest)


def test_one_candidate_for_both_is_suggested_for_speed() -> None:
    """In place of LoRA of rank 256, BD-LoRA of rank 1024 is not faster."""
    deployment = Deployment(SHAPES["llama-3.1-70b"], GPUS["a100"], 8)
    found = candidates(deployment, Traffic(), 256, (8,))
    assert [c.purpose for c in found] == ["speed", None]


def test_nothing_is_suggested_that_does_not_fit() -> None:
    # 17.7 GB of weights on each of 8 GPUs; ten thousand adapters of 180 MB do not fit, nor does one GPU gain.
    deployment = Deployment(SHAPES["llama-3.1-70b"], GPUS["a100"], 8)
    found = candidates(deployment, Traffic(adapters=10_000), 64, (8,))
    assert found and not any(c.fits or c.purpose for c in found)


def test_what_does_not_fit_has_no_throughput() -> None:
    """Two hundred adapters on 8 A100: S-LoRA's of rank 64 fit, those that each rank holds a whole factor of do not."""
    report = report_of("llama-3.1-70b", "a100", 8, Traffic(adapters=200), (64,), (8,))
    assert "s-lora" in report.systems and "replicated" not in report.systems and report.baselines == ("s-lora",)
    assert any("BD-LoRA 4r, 8 blocks does not fit with 200 adapters of rank 256" in note for note in report.notes)


def test_report() -> None:
    report = report_of(*SMALL, ranks=(16, 64))
    assert report.kind == "estimate" and report.estimate and report.title.startswith("Estimate")
    assert set(report.baselines) < set(report.systems)
    points = {tuple(sample.point.items()) for sample in report.samples}
    # Every system at every point.
    assert len(report.samples) == len(points) * len(report.systems) == 2 * 3 * 10
    for sample in report.samples:
        assert set(sample.metrics) <= set(METRICS)
        parts = [value for name, value in sample.metrics.items() if name.startswith("breakdown_")]
        if parts:
            assert sum(parts) == pytest.approx(sample.metrics["latency_ms"])
    notes = "\n".join(report.notes)
    assert "Suggested for speed" in notes and "NVIDIA A100 data sheet" in notes
    assert "paper up to 1.79x, estimate up to 1.25x to 1.26x, by assumption" in notes
    assert "it needs 35 us for each of LoRA's collectives, where 12.5 to 17 are measured" in notes


def test_the_same_arguments_give_the_same_figures() -> None:
    first, second = (report_of(*SMALL, ranks=(16,)) for _ in range(2))
    clock = {"started", "seconds"}
    assert first.model_dump(exclude=clock) == second.model_dump(exclude=clock)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "gpt-9"}, "--model gpt-9: found neither"),
        ({"gpu": "v100"}, "--gpu: found 'v100', expected one of a100"),
        ({"tp": 3}, "--tp: found 3 and heads of 32"),
        ({"model": "llama-3.1-405b"}, "GB of weights and KV cache per GPU, expected at most 80 GB"),
        (
            {"traffic": Traffic(concurrency=8000, input_len=9000)},
            "GB of weights and KV cache per GPU, expected at most 80",
        ),
        ({"tp": 16}, "--tp: found 16, expected at most 8, the GPUs of one machine"),
        ({"ranks": (0,)}, "--rank: found 0, expected at least 1"),
        ({"blocks": (0,)}, "--blocks: found 0, expected at least 1"),
        ({"blocks": (3,), "ranks": (48,)}, "--blocks: found 3 on TP 8"),
        ({"blocks": (128,)}, "--blocks: found 128 at LoRA rank 16, expected a divisor of 32 or 64"),
    ],
    ids=["model", "gpu", "tp", "memory", "cache", "machines", "rank", "no-blocks", "blocks-and-tp", "blocks-and-rank"],
)
def test_what_is_refused(arguments: dict[str, object], message: str) -> None:
    model, gpu, tp, traffic = SMALL
    usual = {"model": model, "gpu": gpu, "tp": tp, "traffic": traffic, "ranks": (16,)}
    with pytest.raises(BDLoRAError, match=re.escape(message)):
        make_estimate(**{**usual, **arguments})  # type: ignore[arg-type]


def test_traffic_that_is_refused() -> None:
    with pytest.raises(BDLoRAError, match="--input-len: found 0, expected at least 1"):
        Traffic(input_len=0)


def test_command_labels_everything_as_an_estimate(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(command)
    folder = tmp_path / "report"
    arguments = ["--model", "llama-3.1-70b", "--rank", "64", "--sources", "--output", str(folder)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    # The heading of a table stands above its frame.
    frames = [i for i, line in enumerate(lines) if line.lstrip().startswith("┏")]
    assert len(frames) == 3
    assert all("Estimate" in lines[i - 1] + lines[i - 2] for i in frames)
    for figure in ("1.79x", "1.23x", "1.63x", "1.30x", "1.26x", "1.59x"):
        assert figure in result.output
    assert "Estimate: constants for A100" in result.output and "NVIDIA A100 data sheet" in result.output
    assert load_report(folder).estimate
