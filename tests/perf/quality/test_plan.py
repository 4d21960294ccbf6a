"""Which adapters are compared, and what is refused before anything is trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from bdlora_cli.perf_quality import quality
from bdlora_perf.quality.plan import PLAN_FILE, QualityOptions, check_plan
from bdlora_perf.quality.systems import AdapterShape, make_systems, matched_shape, target_modules
from bdlora_perf.quality.train import Trainer
from bdlora_sglang.errors import BDLoRAError

app = typer.Typer()
app.command()(quality)


@pytest.mark.parametrize("target", ["attention", "all"])
@pytest.mark.parametrize("shape", [AdapterShape(3), AdapterShape(8, 2), AdapterShape(12, 4)])
def test_parameters_are_what_peft_counts(
    options: Callable[..., QualityOptions], target: str, shape: AdapterShape
) -> None:
    trainer = Trainer.load(options(target_modules=target))
    modules = target_modules(trainer.base, target)
    counted, _ = trainer.new_adapter(shape, 0, "per-block").get_nb_trainable_parameters()
    assert shape.parameters(modules) == counted


def test_the_matched_rank_is_the_closest(model: Path) -> None:
    modules = target_modules(AutoModelForCausalLM.from_pretrained(model), "all")
    for rank in range(1, 40):
        plain = AdapterShape(rank).parameters(modules)
        distances = {r: abs(AdapterShape(r, 4).parameters(modules) - plain) for r in range(4, 200, 4)}
        closest = min(distances, key=lambda r: distances[r])
        close = 0.8 <= AdapterShape(closest, 4).parameters(modules) / plain <= 1.25
        assert matched_shape(modules, rank, 4) == (AdapterShape(closest, 4) if close else None)


def test_systems(model: Path) -> None:
    modules = target_modules(AutoModelForCausalLM.from_pretrained(model), "all")
    systems = make_systems(modules, ("lora", "bd", "healed"), (2, 4, 8), (4,), (2, 3), ("per-block", "peft"))
    same = make_systems(modules, ("lora", "bd"), (2, 4), (4,), (2,), ("per-block",))
    shapes = {system.name: system.shapes for system in systems}
    # 3 times 2 is far from a multiple of 4.
    assert {name: {r: shape.rank for r, shape in found.items()} for name, found in shapes.items()} == {
        "lora": {2: 2, 4: 4, 8: 8},
        "bd4-matched": {2: 4, 4: 8, 8: 12},
        "bd4-2r": {2: 4, 4: 8, 8: 16},
        "bd4-3r": {4: 12, 8: 24},
        "bd4-matched-peft": {2: 4, 4: 8, 8: 12},
        "healed-4": {2: 4, 4: 8, 8: 12},
    }
    assert [system.name for system in same] == ["lora", "bd4-2r"], "where both are the same it is not tried twice"


def test_a_plan_is_fixed(options: Callable[..., QualityOptions]) -> None:
    made = options()
    folder = made.output
    with pytest.raises(BDLoRAError, match=r"--resume .*plan.json: found No such file"):
        check_plan(made.plan, folder, resume=True)
    folder.mkdir()
    check_plan(made.plan, folder, resume=False)
    made.plan.save(folder)
    check_plan(made.plan, folder, resume=True)
    with pytest.raises(BDLoRAError, match="found runs there, expected another folder, or --resume"):
        check_plan(made.plan, folder, resume=False)
    for name, other in {"steps": 7, "seeds": (0, 1, 2), "learning_rates": (1e-2,), "scaling": 1.0}.items():
        with pytest.raises(BDLoRAError, match=rf"--resume .*plan.json: {name}: found .*, expected this command's"):
            check_plan(options(**{name: other}).plan, folder, resume=True)
    (folder / PLAN_FILE).write_text('{"version": 1}')
    with pytest.raises(BDLoRAError, match=r"--resume .*plan.json: found .* validation errors"):
        check_plan(made.plan, folder, resume=True)


def refusal(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert isinstance(result.exception, BDLoRAError), result.output
    return str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "lora,dora"], "--methods: found 'dora', expected lora, bd, truncated, calibrated, healed"),
        (["--methods", "bd"], "--methods: found bd, expected lora: it is what others are beside"),
        (["--ranks", "four"], "--ranks: found 'four', expected whole numbers"),
        (["--ranks", "4,4"], "--ranks: found (4, 4), expected different values, one at least"),
        (["--blocks", "1"], "--blocks: found 1, expected at least 2 (one block is a plain LoRA)"),
        (["--blocks", "3"], "--blocks 3: found 32 features in model.layers.0.self_attn.q_proj, expected a multiple"),
        (["--init", "zero"], "--init: found 'zero', expected per-block, whole-layer, peft"),
        (["--learning-rates", "0"], "--learning-rates: found (0.0,), expected positive numbers"),
        (["--heal-learning-rates", "low"], "--heal-learning-rates: found 'low', expected numbers"),
        (["--dtype", "int8"], "--dtype: found 'int8', expected one of float64, float32, bfloat16, float16"),
        (["--target-modules", "mlp"], "--target-modules: found 'mlp', expected attention or all"),
        (["--part", "3/2"], "--part: found '3/2', expected K/N as 1/2"),
        (["--sequence-length", "8"], "line 1: found a prompt of"),
        (["--test-examples", "60"], "found 60 examples, expected more than the 128 + 60 held out"),
    ],
)
def test_refused_options(model: Path, data: list[Path], tmp_path: Path, arguments: list[str], message: str) -> None:
    output = tmp_path / "runs"
    assert message in refusal("--model", model, "--data", data[0], "--output", output, *arguments)
    assert not list(output.glob("*")), "nothing is left in the way of another try"


@pytest.mark.parametrize("line", ["{", '{"prompt": "a"}', '{"prompt": 1, "completion": "b"}', '["a", "b"]'])
def test_refused_data(model: Path, tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n" + line + "\n")
    message = refusal("--model", model, "--data", path, "--output", tmp_path / "runs")
    assert message.startswith(f"--data {path}: line 2: found {line!r}, expected an object with the texts")


def test_refused_files(model: Path, data: list[Path], tmp_path: Path) -> None:
    output: Any = ["--output", tmp_path / "runs"]
    assert "found no config.json" in refusal("--model", tmp_path, "--data", data[0], *output)
    assert "found No such file" in refusal("--model", model, "--data", tmp_path / "no.txt", *output)
    assert "expected files of different names" in refusal(
        "--model", model, "--data", data[0], "--data", data[0], *output
    )
