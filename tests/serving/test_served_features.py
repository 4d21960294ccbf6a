"""Features of SGLang that the table calls served, with adapters in the batch, on two engines that they share."""

import atexit
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bdlora_perf.synthetic import make_model
from bdlora_perf.synthetic.reference import PeftReference
from tests.serving.zoo import PROMPTS, Zoo

NEW_TOKENS = 8
SPECS: dict[str, dict[str, Any]] = {
    "plain": {"rank": 8},
    "bd2": {"rank": 8, "nblocks": 2},
    "bd4": {"rank": 8, "nblocks": 4},
}


@dataclass
class Case:
    engine: Any
    model: Path
    adapters: dict[str, Path]

    def generate(self, names: list[str | None], prompts: list[list[int]]) -> list[list[int]]:
        sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        answers = self.engine.generate(input_ids=prompts, lora_path=names, sampling_params=sampling)
        return [answer["output_ids"] for answer in answers]

    def assert_equals_peft(self, reference: PeftReference) -> None:
        """One batch of every adapter and the base model, with prompts of several lengths."""
        names = [None, *self.adapters]
        requests = [(name, prompt) for prompt in PROMPTS for name in names]
        answers = self.generate([name for name, _ in requests], [prompt for _, prompt in requests])
        for (name, prompt), tokens in zip(requests, answers, strict=True):
            path = None if name is None else self.adapters[name]
            assert tokens == reference.generate(prompt, path, NEW_TOKENS).tokens, name


@pytest.fixture(scope="module")
def case(zoo: Zoo) -> Iterator[Case]:
    from bdlora_sglang import Engine

    model = zoo.model("llama")
    adapters = {
        name: zoo.adapter(model, f"served-{name}", seed=60 + i, **spec) for i, (name, spec) in enumerate(SPECS.items())
    }
    engine = Engine(
        model_path=str(model),
        tp_size=2,
        dtype="float32",
        lora_paths=[f"{name}={path}" for name, path in adapters.items()],
        # Fewer slots than adapters: they are evicted, and drained for those that wait.
        max_loras_per_batch=2,
        lora_eviction_policy="fifo",
        lora_drain_wait_threshold=0.01,
        chunked_prefill_size=16,
        enable_mixed_chunk=True,
        enable_streaming_session=True,
        lora_strict_loading=True,
        skip_tokenizer_init=True,
        log_level="error",
    )
    try:
        yield Case(engine, model, adapters)
    finally:
        engine.shutdown()
        # SGLang would shut it down once more at exit, and log that to a stream which pytest has closed.
        atexit.unregister(engine.shutdown)


def test_mixed_chunks_fifo_eviction_drain_and_sessions(case: Case) -> None:
    reference = PeftReference(case.model)
    for _ in range(2):
        case.assert_equals_peft(reference)
    session = case.engine.open_session(capacity_of_str_len=1000, streaming=True)
    prompt = list(PROMPTS[0])
    for turn in ([], [301, 17, 5]):
        prompt += turn
        answer = case.engine.generate(
            input_ids=turn or prompt,
            lora_path="bd4",
            session_params={"id": session},
            sampling_params={"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        )
        assert answer["output_ids"] == reference.generate(prompt, case.adapters["bd4"], NEW_TOKENS).tokens
        prompt += answer["output_ids"]
    case.engine.close_session(session)


def test_new_base_weights_under_loaded_adapters(case: Case, tmp_path: Path) -> None:
    """From another checkpoint, then back from tensors: adapters stay loaded and apply to the weights of the day."""
    other = make_model(tmp_path / "other", "llama", seed=99)
    success, message, *_ = case.engine.update_weights_from_disk(str(other))
    assert success, message
    case.assert_equals_peft(PeftReference(other))
    tensors = load_file(case.model / "model.safetensors")
    case.engine.begin_weight_update()
    success, message, *_ = case.engine.update_weights_from_tensor(list(tensors.items()))
    assert success, message
    case.engine.end_weight_update()
    case.assert_equals_peft(PeftReference(case.model))


def test_strict_loading_refuses_what_would_be_skipped(case: Case, tmp_path: Path) -> None:
    """Without the flag it is skipped: test_families.py::test_what_comes_along."""
    folder = shutil.copytree(case.adapters["plain"], tmp_path / "foreign")
    file = folder / "adapter_model.safetensors"
    foreign = "model.visual.layers.0.mlp.up_proj"
    factors = {"lora_A": torch.zeros(8, 64), "lora_B": torch.zeros(64, 8)}
    added = {f"base_model.model.{foreign}.{name}.weight": factor for name, factor in factors.items()}
    save_file(load_file(file) | added, file)
    result = case.engine.load_lora_adapter("foreign", str(folder))
    assert not result.success
    assert foreign in result.error_message
    case.assert_equals_peft(PeftReference(case.model))
