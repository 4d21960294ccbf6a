"""The demo's adapters: the data they were trained on, and that they answer as well served as under PEFT."""

import atexit
import json
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import pytest

from bdlora_perf.demo_adapters import ADAPTERS, chat_answer, chat_prompt, read_reviews
from bdlora_perf.demo_adapters.reviews import FOLDER, Split, make_reviews
from bdlora_perf.demo_adapters.train import accuracy
from bdlora_perf.smollm2 import make_smollm2

# Longer than any right answer.
NEW_TOKENS = 48


@pytest.mark.parametrize("split", get_args(Split))
def test_the_committed_reviews_are_those_that_the_script_writes(split: Split) -> None:
    lines = (FOLDER / f"{split}.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [asdict(review) for review in make_reviews(split)]


def test_no_dish_is_in_both_splits() -> None:
    train, test = ({json.loads(r.answers["json"])["dish"] for r in read_reviews(split)} for split in get_args(Split))
    assert train and test and not train & test


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_smollm2(tmp_path_factory.mktemp("smollm2") / "model")


@pytest.fixture(scope="module")
def under_peft(model: Path) -> dict[str, float]:
    return {a.name: accuracy(model, a.folder, a.name, read_reviews("test")) for a in ADAPTERS}


@pytest.mark.full
def test_the_committed_adapters_are_as_good_as_their_training_says(under_peft: dict[str, float]) -> None:
    for adapter in ADAPTERS:
        said = json.loads((adapter.folder / "training.json").read_text())
        assert under_peft[adapter.name] == said["accuracy"], adapter.name


@pytest.mark.full
@pytest.mark.parametrize("tp", [1, 3])
def test_served_they_are_as_accurate_as_under_peft(tp: int, model: Path, under_peft: dict[str, float]) -> None:
    """All test reviews and adapters in one batch; TP 2 does not divide 9 heads. The demo is the short form."""
    from transformers import AutoTokenizer

    from bdlora_sglang import Engine

    tokenizer = AutoTokenizer.from_pretrained(model)
    asked = [(adapter.name, review) for review in read_reviews("test") for adapter in ADAPTERS]
    engine = Engine(
        model_path=str(model),
        tp_size=tp,
        dtype="float32",
        lora_paths=[f"{adapter.name}={adapter.folder}" for adapter in ADAPTERS],
        log_level="error",
    )
    try:
        answers = engine.generate(
            input_ids=[chat_prompt(tokenizer, review.text) for _, review in asked],
            lora_path=[name for name, _ in asked],
            sampling_params={"temperature": 0, "max_new_tokens": NEW_TOKENS},
        )
    finally:
        engine.shutdown()
        # SGLang would shut it down once more at exit, and log that to a stream which pytest has closed.
        atexit.unregister(engine.shutdown)
    right = dict.fromkeys(under_peft, 0)
    for (name, review), answer in zip(asked, answers, strict=True):
        right[name] += answer["output_ids"] == chat_answer(tokenizer, review.answers[name])
    assert {name: count / len(read_reviews("test")) for name, count in right.items()} == under_peft
