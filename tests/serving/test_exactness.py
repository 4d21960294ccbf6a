"""Served tokens and log-probabilities against PEFT's own forward, for every kind of adapter in one mixed batch."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from bdlora_perf.collectives import count_collectives
from bdlora_perf.reference import PeftReference
from tests.serving.conftest import running_engine
from tests.serving.zoo import PROMPTS, Zoo

NEW_TOKENS = 8


@dataclass
class Case:
    """A running engine and what its requests should give."""

    engine: Any
    tp: int
    adapters: dict[str, Path]
    reference: PeftReference

    def generate(self, names: list[str | None], prompts: list[list[int]], new_tokens: int = NEW_TOKENS) -> list[Any]:
        return self.engine.generate(
            input_ids=prompts,
            lora_path=names,
            sampling_params={"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
            return_logprob=True,
        )


def _case(zoo: Zoo, model: Path, tp: int, dtype: str = "float32") -> Iterator[Case]:
    adapters = zoo.adapters(model)
    reference = PeftReference(model, getattr(torch, dtype))
    with running_engine(model, tp, adapters, dtype=dtype) as engine:
        yield Case(engine, tp, adapters, reference)


@pytest.fixture(
    scope="module",
    params=[(arch, tp) for arch in ("llama", "qwen2", "qwen3", "mistral", "gemma") for tp in (1, 2, 4)],
    ids=lambda p: f"{p[0]}-tp{p[1]}",
)
def case(request: pytest.FixtureRequest, zoo: Zoo) -> Iterator[Case]:
    architecture, tp = request.param
    yield from _case(zoo, zoo.model(architecture), tp)


@pytest.fixture(scope="module")
def padded_case(zoo: Zoo) -> Iterator[Case]:
    """SGLang pads an intermediate size of 480 to 512 at TP 2."""
    yield from _case(zoo, zoo.model("llama", intermediate_size=480), 2)


@pytest.fixture(scope="module")
def bfloat16_case(zoo: Zoo) -> Iterator[Case]:
    yield from _case(zoo, zoo.model("llama"), 2, "bfloat16")


def assert_equals_peft(case: Case) -> None:
    requests = [(name, prompt) for prompt in PROMPTS for name in [None, *case.adapters]]
    answers = case.generate([name for name, _ in requests], [prompt for _, prompt in requests])
    for (name, prompt), answer in zip(requests, answers, strict=True):
        expected = case.reference.generate(prompt, case.adapters.get(name or ""), NEW_TOKENS)
        label = f"{name}, prompt of {len(prompt)}"
        assert answer["output_ids"] == expected.tokens, f"{label}: smallest logit gap {min(expected.gaps)}"
        logprobs = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
        error = max(abs(a - b) for a, b in zip(logprobs, expected.logprobs, strict=True))
        assert error < 1e-4, label


def test_tokens_and_logprobs_equal_peft(case: Case) -> None:
    assert_equals_peft(case)


def test_adapters_change_the_tokens(case: Case) -> None:
    """Else the test above would pass with LoRA left out."""
    prompt = PROMPTS[0]
    base = case.reference.generate(prompt, None, NEW_TOKENS).logprobs
    for name, path in case.adapters.items():
        adapted = case.reference.generate(prompt, path, NEW_TOKENS).logprobs
        assert max(abs(a - b) for a, b in zip(adapted, base, strict=True)) > 1e-2, name


def test_padded_layers_equal_peft(padded_case: Case) -> None:
    assert_equals_peft(padded_case)


def test_lora_adds_no_collectives(case: Case, tmp_path: Path) -> None:
    """The same collectives, of the same sizes, with adapters and without, on every rank."""
    # Prompts that no radix cache has seen, or the forwards would differ in length.
    names: dict[str, list[str | None]] = {"base": [None] * 4, "lora": [*list(case.adapters)[1::3], None]}
    counts = {}
    for kind, (label, adapters) in enumerate(names.items()):
        folder = tmp_path / label
        prompts = [[400 + kind, 17 + i, 3] for i in range(4)]
        case.engine.start_profile(output_dir=str(folder), activities=["CPU"], record_shapes=True)
        case.generate(adapters[:4], prompts, new_tokens=3)
        case.engine.stop_profile()
        counts[label] = count_collectives(folder)
    assert set(counts["base"]) == set(range(case.tp))
    assert counts["lora"] == counts["base"]
    layers = 3
    for rank, counter in counts["base"].items():
        # Three forwards; embedding, attention output and MLP output of each layer reduce once.
        reduced = Counter({c: n for c, n in counter.items() if c.operation == "all_reduce"})
        assert sum(reduced.values()) == (3 * (1 + 2 * layers) if case.tp > 1 else 0), (rank, reduced)


def test_bfloat16_is_as_close_as_sglang_is(bfloat16_case: Case, record_property: Any) -> None:
    """SGLang's own order of arithmetic differs from PEFT's; LoRA must not add to that more than its own rounding."""
    errors: dict[str | None, float] = {}
    for name in [None, *bfloat16_case.adapters]:
        answers = bfloat16_case.generate([name] * len(PROMPTS), list(PROMPTS))
        squares = []
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            expected = bfloat16_case.reference.logprobs(
                prompt, bfloat16_case.adapters.get(name or ""), answer["output_ids"]
            )
            got = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
            squares += [(a - b) ** 2 for a, b in zip(got, expected, strict=True)]
        errors[name] = (sum(squares) / len(squares)) ** 0.5
    record_property("rms_logprob_error", {str(name): round(error, 4) for name, error in errors.items()})
    print("RMS log-probability error in bfloat16:", {str(n): round(e, 4) for n, e in errors.items()})
    base = errors.pop(None)
    assert base > 0
    assert max(errors.values()) < 4 * base, errors
