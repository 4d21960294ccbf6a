"""Training and converting on a tiny model, and going on with a folder."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from bdlora_cli.perf_quality import quality
from bdlora_perf.quality.data import Example, load_task, make_batch
from bdlora_perf.quality.folder import Cell, Trial
from bdlora_perf.quality.plan import QualityOptions, make_plan
from bdlora_perf.quality.report import make_report, samples_of
from bdlora_perf.quality.sweep import Sweep
from bdlora_perf.quality.systems import AdapterShape
from bdlora_perf.quality.train import target_logits
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
    return contents(sweep.options.output / "runs")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def finished(model: Path, data: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    plan = make_plan(model, data, FIELDS)
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
    assert report.metrics["output_throughput"].label == "estimated output throughput"


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


def test_losses_and_gradients_are_those_of_transformers(finished: Sweep) -> None:
    """Its own loss, of all positions: ours leaves out where nothing is to be predicted, in examples of many lengths."""
    trainer, task = finished.trainer, finished.tasks["sums"]
    examples = [*task.train[:3], Example(task.train[3].ids[:5], 3), Example(task.train[4].ids * 2, 9)]
    model = trainer.new_adapter(AdapterShape(8, 2), 0, "per-block")
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    batch = make_batch(examples, trainer.tokenizer.eos_token_id, trainer.device)
    logits, targets = target_logits(model, batch)
    assert logits.shape[1] < batch.ids.shape[1] - 1, "something is left out"
    ours = cross_entropy(logits.flatten(0, 1), targets.flatten())
    theirs = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, weights), torch.autograd.grad(theirs, weights))


@pytest.mark.parametrize("shape", [AdapterShape(4), AdapterShape(8, 2)], ids=["lora", "bd-lora"])
def test_training_lowers_the_loss(finished: Sweep, shape: AdapterShape) -> None:
    trainer, task = finished.trainer, finished.tasks["story"]
    model = trainer.new_adapter(shape, 0, "per-block")
    base, before = (trainer.evaluate(each, task, task.test) for each in (trainer.base, model))
    # B is zero: the adapter does nothing yet.
    assert before.loss == pytest.approx(base.loss, rel=1e-6)
    losses = trainer.train(model, task.train, 40, 1e-2, 0)
    after = trainer.evaluate(model, task, task.test)
    assert losses[-1] < 0.7 * losses[0] and len(losses) == 40
    # Adapters share the base model's weights, and leave them as they are.
    assert trainer.evaluate(trainer.base, task, task.test) == base
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


@pytest.mark.parametrize(
    ("cell", "grid"),
    [
        (Cell("sums", "bd", AdapterShape(6, 2), "per-block"), "learning_rates"),
        (Cell("sums", "healed", AdapterShape(6, 2), "per-block", 4), "heal_learning_rates"),
    ],
    ids=["bd", "healed"],
)
def test_the_learning_rate_is_the_validation_split_s(finished: Sweep, cell: Cell, grid: str) -> None:
    results = {rate: finished.folder.read(Trial(cell, 0, rate).name) for rate in FIELDS[grid]}
    best = min(results, key=lambda rate: results[rate].validation_loss)  # type: ignore[union-attr]
    chosen = finished.chosen_run(cell, 1)
    assert chosen is not None and chosen.learning_rate == best


def test_a_frozen_base_of_fewer_bits(options: Options) -> None:
    """Adapters stay in float32; the figures are near."""
    sweeps = [run(options(dtype=name, output=name), most=1) for name in ("float32", "bfloat16")]
    exact, rounded = (sweep.folder.read(next(sweep.runs()).name) for sweep in sweeps)
    assert exact is not None and rounded is not None
    assert exact.loss != rounded.loss and exact.loss == pytest.approx(rounded.loss, rel=0.01)
    model = sweeps[1].trainer.new_adapter(AdapterShape(4), 0, "per-block")
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    assert sweeps[1].trainer.base.dtype is torch.bfloat16


WORDS = "--ranks 4 --blocks 2 --methods lora,bd --multiples 3 --seeds 0,1 --learning-rates 1e-2 --tp 2 "
WORDS += "--sequence-length 32 --validation-examples 8 --test-examples 8"


def arguments(model: Path, data: list[Path], output: Path, steps: int) -> list[str]:
    files = [word for path in data for word in ("--data", str(path))]
    return [*WORDS.split(), "--steps", str(steps), "--model", str(model), "--output", str(output), *files]


def test_the_command_and_its_second_half(model: Path, data: list[Path], tmp_path: Path) -> None:
    """One part, then the rest with --resume; the folder is not begun anew."""
    app = typer.Typer()
    app.command()(quality)
    output = tmp_path / "runs"
    command = arguments(model, data, output, steps=2)
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


def test_an_interrupted_command_goes_on_with_the_same_bytes(model: Path, data: list[Path], tmp_path: Path) -> None:
    """Ctrl-C after the first of 6 runs: what is finished is reported, nothing half-written, --resume does the rest."""
    data, broken, whole = data[:1], tmp_path / "broken", tmp_path / "whole"
    command = [sys.executable, "-m", "bdlora_cli.main", "perf", "quality"]
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(
            [*command, *arguments(model, data, broken, steps=20)],
            stdout=log,
            stderr=subprocess.STDOUT,
            # A shell lets what it turns in the background ignore Ctrl-C, and we may be such.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while process.poll() is None and not list(broken.glob("runs/*.json")):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        code = process.wait()
        log.seek(0)
        text = log.read()
    assert code == 130, text
    report = load_report(broken)
    assert 0 < len(report.samples) < 6
    assert report.notes[0] == f"Interrupted: {len(report.samples)} of 6 turns are in this report."
    assert report.notes[1] == "The same command with --resume goes on." and report.notes[1] in text
    assert not [path for path in broken.rglob("*") if path.name.startswith(".")]
    app = typer.Typer()
    app.command()(quality)
    for words in ([*arguments(model, data, broken, 20), "--resume"], arguments(model, data, whole, 20)):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
    assert contents(broken / "runs") == contents(whole / "runs")
    assert load_report(broken).samples == load_report(whole).samples
