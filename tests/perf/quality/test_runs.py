"""Training and converting on a tiny model, and going on with a folder."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from bdlora_cli.perf_quality import quality
from bdlora_perf.quality.data import load_task
from bdlora_perf.quality.folder import Cell, Trial
from bdlora_perf.quality.plan import QualityOptions
from bdlora_perf.quality.report import make_report, samples_of
from bdlora_perf.quality.sweep import Sweep
from bdlora_perf.quality.systems import AdapterShape
from bdlora_perf.report import run as measurement
from bdlora_perf.report.schema import Report, load_report
from bdlora_sglang.convert import ConvertOptions, RankChoice, lora2bd
from bdlora_sglang.errors import BDLoRAError
from tests.perf.quality.conftest import COMMAND, FIELDS
from tests.perf.report.samples import MACHINE

Options = Callable[..., QualityOptions]


def run(options: QualityOptions, most: int = 10**6) -> Sweep:
    """At most so many new runs, then it is broken off."""
    sweep = Sweep(options)
    for run in sweep.runs():
        if not sweep.is_finished(run):
            if not most:
                break
            sweep.finish(run)
            most -= 1
    return sweep


def files(sweep: Sweep) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (sweep.options.output / "runs").iterdir()}


@pytest.fixture(scope="module")
def finished(model: Path, data: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    from bdlora_perf.quality.plan import make_plan

    plan = make_plan(model, data, **FIELDS)
    folder = tmp_path_factory.mktemp("finished") / "runs"
    return run(QualityOptions(plan, model, {path.stem: path for path in data}, folder, "cpu", COMMAND, tp=2))


def report_of(sweep: Sweep) -> Report:
    report = make_report(sweep, measurement.Run(COMMAND, 0, samples_of(sweep)))
    return report.model_copy(update={"machine": MACHINE, "started": "", "seconds": 0.0})


def test_all_runs_are_done(finished: Sweep) -> None:
    """What is trained has two rates for the first seed, one afterwards; two conversions are not."""
    names = files(finished)
    assert len(names) == finished.num_runs == 2 * (5 * 3 + 2 * 2)
    report = report_of(finished)
    assert len(report.samples) == 2 * 7 * 2
    assert {s.metrics["parameters"] for s in report.samples if s.system == "lora"} == {4.0 * 2 * 512}
    assert all(s.metrics["output_throughput"] > 0 for s in report.samples)


def test_broken_off_runs_go_on_with_the_same_bytes(finished: Sweep, options: Options) -> None:
    """Wherever it is broken off, in parts, in another folder: elsewhere on another machine."""
    run(options(tasks=2), most=9)
    moved = options(tasks=2, output="elsewhere")
    shutil.move(options(tasks=2).output, moved.output)
    run(options(tasks=2, output="elsewhere", part=(2, 2)), most=5)
    run(moved)
    sweep = run(moved, most=0)
    assert report_of(sweep).model_dump_json() == report_of(finished).model_dump_json()
    assert files(sweep) == files(finished)


def test_partial_results_make_a_report(options: Options) -> None:
    sweep = run(options(), most=2)
    report = report_of(sweep)
    assert {(sample.system, sample.round) for sample in report.samples} == {("lora", 0)}
    assert report.notes[0] == "1 of 14 figures are finished; the others are missing here."


def test_damaged_folders_are_refused(options: Options) -> None:
    made = options()
    sweep = run(made, most=3)
    first = made.output / "runs" / f"{next(sweep.runs()).name}.json"
    text = first.read_text()
    for broken in (text[:40], "[]", text.replace('"loss"', '"lost"')):
        first.write_text(broken)
        with pytest.raises(
            BDLoRAError, match=rf"{first}: found .*, expected a finished run \(delete it to do it again\)"
        ):
            run(made)
    first.write_text(text.replace("seed0", "seed5"))
    with pytest.raises(BDLoRAError, match=r"found the run .*seed5.*, expected .*seed0"):
        run(made)
    first.write_text(text)
    shutil.rmtree(made.output / "adapters")
    with pytest.raises(BDLoRAError, match="expected the LoRA of the finished run"):
        run(made)


@pytest.mark.parametrize("shape", [AdapterShape(4), AdapterShape(8, 2)], ids=["lora", "bd-lora"])
def test_training_lowers_the_loss(finished: Sweep, shape: AdapterShape) -> None:
    trainer, task = finished.trainer, finished.tasks["story"]
    model = trainer.new_adapter(shape, 0, "per-block")
    before = trainer.evaluate(model, task, task.test)
    # B is zero: the adapter does nothing yet.
    assert before.loss == pytest.approx(trainer.evaluate(trainer.base, task, task.test).loss, rel=1e-6)
    losses = trainer.train(model, task.train, 40, 1e-2, 0)
    after = trainer.evaluate(model, task, task.test)
    assert losses[-1] < 0.7 * losses[0]
    assert after.loss < 0.7 * before.loss and after.accuracy > before.accuracy


def test_conversions_have_the_figures_of_peft(finished: Sweep, model: Path, data: list[Path], tmp_path: Path) -> None:
    """transformers' own loss, token by token, of the adapter that the library converts and PEFT reads."""
    lora = Cell("sums", "lora", AdapterShape(4), "per-block")
    cell = Cell("sums", "truncated", AdapterShape(6, 2), "per-block", 4)
    chosen = finished.chosen_run(lora, 1)
    assert chosen is not None
    report = lora2bd(finished.folder.adapter(chosen), tmp_path / "bd", ConvertOptions(2, RankChoice(rank=6)))
    base: Any = AutoModelForCausalLM.from_pretrained(model)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "bd")).eval()
    task = load_task(data[0], AutoTokenizer.from_pretrained(model), 32, (8, 8))
    total, tokens, right, hits = 0.0, 0, 0, 0
    for example in task.test:
        ids = torch.tensor([example.ids])
        labels = ids.clone()
        labels[:, : example.start] = -100
        count = len(example.ids) - example.start
        total += adapted(input_ids=ids, labels=labels).loss.item() * count
        tokens += count
        with torch.inference_mode():
            best = adapted(input_ids=ids).logits[0, example.start - 1 : -1].argmax(-1)
        hits += int((best == ids[0, example.start :]).sum())
        answer = adapted.generate(input_ids=ids[:, : example.start], max_new_tokens=count, do_sample=False)
        right += answer[0].tolist() == list(example.ids)
    name = Trial(cell, 1, 0.0).name
    result = finished.folder.read(name)
    assert result is not None, f"{name} of {sorted(files(finished))}"
    assert result.loss == pytest.approx(total / tokens, rel=1e-5)
    assert result.accuracy == right / len(task.test) and result.token_accuracy == pytest.approx(hits / tokens)
    assert result.delta_error == pytest.approx(report.error) and result.parameters == report.parameters


def test_the_learning_rate_is_the_validation_split_s(finished: Sweep) -> None:
    cell = Cell("sums", "bd", AdapterShape(6, 2), "per-block")
    results = {rate: finished.folder.read(Trial(cell, 0, rate).name) for rate in FIELDS["learning_rates"]}
    best = min(results, key=lambda rate: results[rate].validation_loss)  # type: ignore[union-attr]
    chosen = finished.chosen_run(cell, 1)
    assert chosen is not None and chosen.learning_rate == best


def test_the_command_and_its_second_half(model: Path, data: list[Path], tmp_path: Path) -> None:
    """One part, then the rest with --resume; the folder is not begun anew."""
    app = typer.Typer()
    app.command()(quality)
    output = tmp_path / "runs"
    words = "--ranks 4 --blocks 2 --methods lora,bd --multiples 3 --seeds 0,1 --learning-rates 1e-2 --steps 2 --tp 2 "
    words += "--sequence-length 32 --validation-examples 8 --test-examples 8"
    command = [*words.split(), "--model", str(model), "--output", str(output)]
    command += [word for path in data for word in ("--data", str(path))]
    first = CliRunner().invoke(app, [*command, "--part", "1/2"])
    assert first.exit_code == 0, first.output
    # A part is a task here: LoRA, matched and 3r with two seeds.
    assert len(load_report(output).samples) == 6
    second = CliRunner().invoke(app, [*command, "--resume"])
    assert second.exit_code == 0, second.output
    report = load_report(output)
    assert len(report.samples) == 12 and {sample.point["task"] for sample in report.samples} == {"sums", "story"}
    assert not any("missing" in note for note in report.notes)
    again = CliRunner().invoke(app, command)
    assert isinstance(again.exception, BDLoRAError) and "found runs there" in str(again.exception)
