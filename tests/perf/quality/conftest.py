"""A tiny Llama with two tasks, and the command's plan for them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bdlora_perf.quality.plan import QualityOptions, make_plan
from bdlora_perf.synthetic import make_model

COMMAND = "bdlora perf quality"
# 2 and 4 blocks divide all sizes.
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
FIELDS: dict[str, Any] = {
    "methods": ("lora", "bd", "truncated", "calibrated", "healed"),
    "ranks": (4,),
    "blocks": (2,),
    "multiples": (2,),
    "inits": ("per-block", "peft"),
    "seeds": (0, 1),
    "learning_rates": (1e-2, 3e-2),
    "heal_learning_rates": (3e-3, 1e-2),
    "target_modules": "all",
    "scaling": 2.0,
    "steps": 6,
    "heal_steps": 3,
    "batch_size": 4,
    "sequence_length": 32,
    "validation_examples": 8,
    "test_examples": 8,
    "calibration_tokens": 64,
    "dtype": "float32",
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("quality") / "model", **SHAPE)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"prompt": f"{i} plus one is", "completion": f" {i + 1}."}) for i in range(60)]
    (folder / "sums.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "story.txt").write_text(
        "".join(f"The {i}th little model was proud of its {i} layers. " for i in range(90))
    )
    return [folder / "sums.jsonl", folder / "story.txt"]


@pytest.fixture
def options(model: Path, data: list[Path], tmp_path: Path) -> Callable[..., QualityOptions]:
    """Those of the plan with some fields changed; ``tasks`` is how many, ``part`` and ``output`` are the options'."""

    def make(tasks: int = 1, part: tuple[int, int] = (1, 1), output: str = "runs", **fields: Any) -> QualityOptions:
        files = data[:tasks]
        plan = make_plan(model, files, {**FIELDS, **fields})
        paths = {path.stem: path for path in files}
        made = QualityOptions(plan, model, paths, tmp_path / output, "cpu", COMMAND, tp=2)
        return replace(made, part=part)

    return make
